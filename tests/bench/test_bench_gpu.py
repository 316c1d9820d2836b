"""The benchmarks on a GPU, as far as they can be seen without one: timer, goals, script."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import layerlr.backends.cuda
from bench import (
    agree,
    goals,
    measure,
    memory,
    merge,
    peers,
    repeat,
    report,
    sanitize_step,
    shapes,
    small,
    step_time,
    summary,
    timing,
    tune,
)
from layerlr import agreement

ROOT = Path(__file__).resolve().parents[2]
N = len(small.CASES)


class Device:
    """A device that a made-up clock drives: the host is quick, the device does 5 s of work."""

    def __init__(self):
        self.clock, self.busy_until, self.log = 0.0, 0.0, []

    def enqueue(self, seconds, word):
        self.busy_until = max(self.busy_until, self.clock) + seconds
        self.log.append(word)

    def synchronize(self):
        self.clock = max(self.clock, self.busy_until)
        self.log.append("wait")

    def event(self):
        return Event(self)

    def step(self):
        self.clock += 2.0  # before the device gets to see any of it
        self.enqueue(5.0, "step")

    def timer(self):
        return timing.EventTimer(
            event=self.event,
            synchronize=self.synchronize,
            occupy=lambda seconds: self.enqueue(seconds, "occupy"),
            flush=lambda: self.enqueue(1.0, "flush"),
            now=lambda: self.clock,
        )


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.busy_until, self.device.clock)
        self.device.log.append("event")

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_device_time_is_apart_from_the_host_s():
    device = Device()
    sample = device.timer()(device.step, 3)
    # Were the device not kept busy, it would show the host's two seconds as its own.
    assert sample == (pytest.approx(5.0), pytest.approx(2.0))
    assert device.log[:6] == ["wait", "step"] * 3
    assert device.log[6:] == ["flush", "occupy", "event", "step", "event", "wait"] * 3


def test_contenders_of_a_gpu():
    every = peers.contenders("adam", ["cuda", "triton"], "cuda")
    names = {c.name: c for c in every}
    assert len(names) == len(every)
    for name in ("layerlr AdamW None", "layerlr Adam singh", "layerlr Adam layca"):
        assert names[name].backend == "cuda"
        assert names[f"{name} triton"].backend == "triton"
    assert "timm Lamb foreach" in names and "timm Lamb loop" not in names
    for model, expected in (
        ("resnet50", {"AdamW None", "Adam singh", "Adam layca", "AdamW lamb"}),
        ("gpt2_xl", {"AdamW lamb"}),
        ("tiny300", set()),
    ):
        chosen = [c.name for c in step_time.choose("adam", model, None, ["cuda"], "cuda")]
        assert {f"layerlr {name} reference" for name in expected} == {
            name for name in chosen if name.endswith("reference")
        }
        assert "layerlr AdamW lamb" in chosen


def gpu_rows(slower=1.0, host_us=0.2, extra=0, leave_out=()):
    """A made-up run on a GPU that copies 4 TB/s and where ours reach 95% of it, over `slower`."""
    rows = []
    for model in shapes.DEFAULTS["cuda"]:
        _, tensors, count = shapes.MODELS[model]
        for family in peers.BASELINES:
            for c in peers.contenders(family, ["cuda"], "cuda"):
                if c.name in leave_out or model in leave_out:
                    continue
                once, two = (
                    c.once_bytes_per_param(torch.float32),
                    c.bytes_per_param(torch.float32),
                )
                moved = (once if model in goals.GPU_ONCE else two) or once or 100
                seconds = moved * count / (0.95 * 4e12)
                base = (20 if family == "sgd" else 28) * count / (0.95 * 4e12)
                if c.package == "layerlr":
                    seconds *= 20 if c.backend == "reference" else slower
                speed = 4000.0 if c.name == "memory copy" else None
                spread = timing.Spread(seconds, seconds, seconds)
                ratio = timing.Spread(*[seconds / base] * 3)
                host = timing.Spread(*[host_us * 1e-6 * tensors] * 3)
                rows.append(
                    report.Row(
                        *(model, tensors, count, "float32", family, c.name, c.package, c.rule),
                        *(spread, None if c.package == "memory" else ratio, two, speed, None),
                        *(None, 9, 1, c.backend, once, host, extra),
                    )
                )
    return rows


def parts(rows):
    """The word of each part's line."""
    found = goals.gpu_verdicts(rows)
    lines = [goals.summary(part, found) for part in goals.GPU_PARTS]
    assert all(line.startswith(f"goal ({part})") for part, line in zip("abcde", lines))
    return [line[9:].partition("  ")[0].strip() for line in lines]


def test_gpu_goals_met():
    assert parts(gpu_rows()) == ["met"] * 5
    found = goals.gpu_verdicts(gpu_rows())
    assert goals.lines(found) == [goals.summary(part, found) for part in goals.GPU_PARTS]
    # all are equally far from their bound
    assert re.search(r"40 met; worst: \w+ layerlr \w+ \w+, of the copy", goals.summary("a", found))


def test_gpu_goals_missed():
    assert parts(gpu_rows(slower=1.04)) == ["met", "MISSED", "met", "met", "met"]
    assert parts(gpu_rows(slower=1.5))[:3] == ["MISSED"] * 3
    assert parts(gpu_rows(host_us=0.31)) == ["met"] * 3 + ["MISSED", "met"]
    assert parts(gpu_rows(extra=2 << 20)) == ["met"] * 4 + ["MISSED"]
    found = goals.gpu_verdicts(gpu_rows(host_us=0.31))
    missed = [line for line in goals.lines(found) if line.startswith("MISSED")]
    assert len(missed) == 3 * len(goals.GPU_OURS)
    assert "0.310 <= 0.30" in missed[0]


def test_gpu_goals_not_measured():
    assert parts([]) == ["not measured"] * 5
    assert parts(gpu_rows(leave_out=goals.GPU_OURS)) == ["not measured"] * 5
    half = [replace(row, dtype="bfloat16") for row in gpu_rows()]
    assert parts(half) == ["not measured"] * 5, "the goals are stated for float32"
    assert parts(gpu_rows(leave_out=["llama3_8b_16of32"])) == ["met so far"] * 3 + [
        "met",
        "met so far",
    ]
    # A peer that is not there takes its comparison along, no more.
    found = goals.gpu_verdicts(gpu_rows(leave_out=["timm Lars foreach"]))
    assert goals.summary("c", found).startswith("goal (c) met so far")
    assert "27 met, 5 not measured" in goals.summary("c", found)


def test_gpu_limits_follow_the_bytes():
    limits = goals.GPU_RATIO_LIMITS
    assert limits["vit_b"]["layerlr SGD layca"] == 1.0
    assert limits["gpt2_xl"]["layerlr SGD layca"] == pytest.approx(1.05 * 1.4)
    assert limits["llama3_8b_16of32"]["layerlr AdamW lamb"] == pytest.approx(1.5)


def test_verdicts_from_a_file(tmp_path, capsys):
    out = tmp_path / "run.json"
    report.write(out, report.Result({"gpu": "a GPU", "cpu": "a CPU", "torch": "2"}, gpu_rows()))
    assert len(report.read(out).rows) == len(gpu_rows())
    goals.main([str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:13] for line in printed] == [f"goal ({part}) met " for part in "abcde"]
    goals.main([str(tmp_path / "missing.json")])
    assert capsys.readouterr().out.count("not measured") >= 5
    summary.main([str(out), str(tmp_path / "run.md")])
    page = (tmp_path / "run.md").read_text()
    assert "### llama3_8b_16of32, float32" in page and "The copy moves 4,000 GB/s." in page


def test_models_too_large_run_one_after_the_other(monkeypatch, capsys):
    made: list[weakref.ref] = []

    def build(params):
        assert all(ref() is None for ref in made), "a contender before is still there"
        made.append(weakref.ref(optimizer := torch.optim.SGD(params, lr=1e-3)))
        return optimizer

    rows = [peers.Contender(n, "torch", build) for n in ("torch SGD fused", "other")]
    monkeypatch.setattr(step_time, "contenders", lambda *_: rows)
    monkeypatch.setattr(memory, "fit_together", lambda *_: False)
    result = step_time.run(["tiny128"], families=["sgd"], repeats=2)
    assert len(made) == 2 and not result.left_out
    assert [row.interleaved for row in result.rows] == [False, False]
    assert "one after the other" in capsys.readouterr().out


def test_what_does_not_fit_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50 << 10)
    result = step_time.run(["tiny300"], families=["adam"], repeats=1, only="AdamW loop")
    assert result.left_out == {"tiny300: all of adam": "needs 0.0 GB at least, 0.0 GB are free"}
    cuda, half = torch.device("cuda"), torch.bfloat16
    ours, torchs = peers.contenders("adam", ["cuda"], "cuda")[8], peers.contenders("adam")[0]
    assert memory.weights_bytes(10, half) == 40
    assert memory.own_bytes(ours, "adam", 10, half) == 80
    assert memory.own_bytes(torchs, "adam", 10, half) == 40
    assert not memory.fit_together([ours, torchs], "adam", 1 << 30, torch.float32, cuda)
    assert memory.shortage(51 << 10, cuda) and not memory.shortage(50 << 10, cuda)


def test_host_time_is_shown_apart(monkeypatch):
    monkeypatch.setattr(measure, "timer_for", lambda *_: lambda step, n: timing.Sample(2e-3, 3e-4))
    result = step_time.run(["tiny128"], families=["sgd"], repeats=2, only="foreach")
    (row,) = [row for row in result.rows if row.contender == "torch SGD foreach"]
    assert row.host_seconds == timing.Spread(3e-4, 3e-4, 3e-4)
    text = report.table(result.rows)
    assert "host us/tensor" in text and "300.0" in text and " 2.344" in text


def test_repeatability_is_checked(capsys, monkeypatch):
    where = ["--backend", "cpu", "--device", "cpu", "--shapes", "small", "--dtypes", "float32"]
    assert repeat.main([*where, "--runs", "2"]) == 0
    assert f"{N} of {N} the same to the bit over 2 runs" in capsys.readouterr().out
    turn = iter(range(100))
    step = small.step

    def unsteady(case, params, *more):
        optimizer = step(case, params, *more)
        params[0].data[0] += 1e-3 * next(turn)
        return optimizer

    monkeypatch.setattr(repeat, "step", unsteady)
    monkeypatch.setattr(repeat, "CASES", small.CASES[:1])
    assert repeat.main([*where, "--runs", "2"]) == 1
    assert "DIFFERS small float32 SGD no rule momentum=0.9: run 1" in capsys.readouterr().out


def test_engine_and_reference_agree(capsys, monkeypatch):
    where = ["--backend", "cpu", "--device", "cpu", "--shapes", "small", "--dtypes", "float32"]
    assert agree.main(where) == 0
    assert f"{N} of {N} agree with the reference\n" in capsys.readouterr().out
    assert agree.main([*where, "--seconds", "0"]) == 2
    assert f"0 of 0 agree with the reference, {N} not tried" in capsys.readouterr().out
    step = small.step

    def off(case, params, backend, n):
        """The engine's plain steps are too long, and RMSprop's are not taken."""
        if case[0] == "RMSprop" and backend == "cpu":
            raise ValueError("no such step")
        optimizer = step(case, params, backend, n)
        if case[1] is None and backend == "cpu":
            optimizer.param_groups[0]["lr"] *= 1 + 1e-6
        return optimizer

    monkeypatch.setattr(agree, "step", off)
    assert agree.main(where) == 1
    printed = capsys.readouterr().out
    plain = sum(case[1] is None for case in small.CASES)
    assert printed.count(": WRONG: ") == plain and f"{N - plain - 1} of {N} agree" in printed
    assert "centered=True: FAILED: ValueError: no such step" in printed


def test_units_in_the_last_place():
    one = torch.ones(3)
    assert agreement.worst(one, one, one + torch.tensor([0, 2**-23, 2**-22])) == 2
    assert agreement.worst(4 * one, one, one + 2**-21) == 1, (
        "of the weight before, where it is larger"
    )
    assert agreement.worst(one, one, torch.tensor([1, float("nan"), 1])) == float("inf")


def test_runs_merge(tmp_path, capsys):
    rows, paths = gpu_rows(), []
    for model in shapes.DEFAULTS["cuda"]:
        paths.append(tmp_path / f"{model}.json")
        mine = [row for row in rows if row.model == model]
        report.write(paths[-1], report.Result({"gpu": "a GPU", "command": model}, mine))
    merge.main([*map(str, paths), "--out", str(tmp_path / "all.json")])
    result = report.read(tmp_path / "all.json")
    assert len(result.rows) == len(rows)
    assert result.machine["command"].startswith("resnet50; vit_b; ")
    printed = capsys.readouterr().out
    assert printed.count("goal (") == printed.count(" met ") == 5
    (line,) = [x for x in printed.splitlines() if x.startswith("layerlr SGD layca  ")]
    assert line.split()[3:6] == ["0.135", "1.00", "95%"]
    again = merge.merge([result, replace(result, rows=[replace(rows[0], rounds=77)])])
    assert len(again.rows) == len(rows) and again.rows[0].rounds == 77


def test_choices_of_the_cuda_engine_take_turns(tmp_path, capsys):
    for choice in tune.choices(132).values():
        with tune.held(choice):  # the engine knows every choice
            pass
    out = tmp_path / "tune.json"
    where = ["--backend", "cpu", "--device", "cpu", "--models", "tiny128", "--rounds", "2"]
    assert tune.main([*where, "--out", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(tune.RULES)
    assert out.read_text().count('"choice": "default again"') == len(tune.RULES)


def test_variants_of_the_cuda_engine():
    variants = repeat.variants("cuda")
    assert len({name for name, _, _ in variants}) == len(variants) > 4
    for _, held, _ in variants:
        with held():  # the engine knows every choice
            pass


def test_sanitized_steps_run(capsys):
    assert sanitize_step.main(["--backend", "cpu", "--device", "cpu", "--steps", "1"]) == 0
    assert f"{2 * N} steps" in capsys.readouterr().out
    with sanitize_step.grid(4):
        assert layerlr.backends.cuda._tuning.blocks == 4


def test_small_tensors_lie_back_to_back():
    buffer = small.Buffer(small.SMALL, torch.float32, "cpu")
    params = buffer.params(shift=1)
    assert [tuple(p.shape) for p in params] == list(small.SMALL)
    ends = [p.storage_offset() + p.numel() for p in params]
    assert [p.storage_offset() for p in params] == [1, *ends[:-1]]
    plain = buffer.params()
    assert all(torch.equal(a, b) and torch.equal(a.grad, b.grad) for a, b in zip(params, plain))


def bash(*arguments, **environment):
    if shutil.which("bash") is None:
        pytest.skip(reason="there is no bash")
    command = ["bash", *arguments]
    # The package under test may be an installed one, beside which there is no bench folder.
    where = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)


def test_gpu_script_is_bash():
    assert bash("-n", "bench/gpu.sh").returncode == 0


@pytest.mark.full("the script for a GPU")
def test_gpu_script_s_dry_run(tmp_path):
    done = bash("bench/gpu.sh", "--dry-run", CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for module in ("agree", "step_time", "repeat", "sanitize_step", "profile_step", "tune"):
        assert f"bench.{module} imports and reads its arguments" in done.stdout
    stages = [line[1:].partition(",")[0] for line in done.stdout.splitlines() if line[0] == "["]
    assert stages[0] == "self-check" and set(stages[1:3]) == {"agree-triton", "agree-cuda"}
    assert stages[3:5] == ["steps-float32-resnet50", "steps-float32-vit_b"]
    assert {"memcheck", "racecheck", "repeat", "tests-first", "tests-rest"} == set(stages[5:10])
    assert stages[10] == "counters" and stages[-7:-5] == ["tune", "stalls"]
    papers = {"agree-cuda", "char_gpt", "unpack", "singh_cifar10-60", "singh_cifar10-50"}
    assert set(stages[-5:]) == papers
    assert "bench.papers.char_gpt imports and reads its arguments" in done.stdout
    assert "--dist worksteal --timeout 20 --timeout-method thread" in done.stdout
    assert not list(tmp_path.iterdir())


FAKE = """\
#!/usr/bin/env bash
# Python on a machine with a GPU
echo "$*" >>"$ASKED"
case "$*" in
*"-m bench.agree --backend triton"*) echo "52 of 52 agree" ;;
*"-m bench.agree"*) echo "$AGREE of 78 agree"; [ "$AGREE" -eq 78 ] || exit 2 ;;
*"-m pytest"*)
  echo '["tests/test_a.py::test_a", "passed", 0.1]' >>"$TEST_LOG"
  echo '["tests/test_a.py::test_b", "failed", 0.1, "why"]' >>"$TEST_LOG"
  exit 1 ;;
*"-m bench.step_time"*" $HANGS "*) (trap "" TERM; sleep 300) ;;
*"-m bench.step_time"*) for last; do :; done; echo {} >"$last" ;;
*"-m bench.papers.$HANGS "*) (trap "" TERM; sleep 300) ;;
*"-m bench.papers."*)
  case "$*" in *--step-down*) name=singh_cifar10_50000 ;; *) name="${2##*.}" ;; esac
  for kind in json md png; do echo {} >"$OUT/$name.$kind"; done; echo "trained $name" ;;
*"-m bench.merge"*) for last; do :; done; echo {} >"$last"; echo the table ;;
*"-m "*|*setup.py*|-c*) echo ran ;;
*) exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def gpu_script(tmp_path):
    """Run the script with a Python that says it has a GPU, and does nothing."""
    fake, root = tmp_path / "python", tmp_path / "root"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    for folder in ("bench", "tests", "layerlr", ".gpu/data/text"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "bench/gpu.sh", root / "bench")

    def run(call="check", **environment):
        where = {"AGREE": "78", "HANGS": "none", "OUT": str(root / "out"), "TOTAL": "60"}
        where |= {"PYTHON": str(fake), "REAL": sys.executable, "ASKED": str(tmp_path / "asked")}
        done = bash(str(root / "bench/gpu.sh"), call, **where | environment)
        lines = (root / "out/verdicts.txt").read_text().splitlines()
        found = dict(line.partition(" s: ")[2].split(": ", 1) for line in lines)
        return done, found, (tmp_path / "asked").read_text()

    return run


@pytest.mark.full("the script for a GPU")
def test_gpu_script_s_verdicts(gpu_script, tmp_path):
    done, found, asked = gpu_script()
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["agree-cuda"].endswith("78 of 78 agree")
    assert found["tests-rest"].startswith("exit 1 ")
    assert found["tests so far"] == "2 passed, 2 failed, 0 skipped"
    assert "steps-bfloat16-llama3_8b_16of32" in found and "--backend cuda,triton" in asked
    last = done.stdout[done.stdout.index("of the tests that failed") :]
    assert '::test_b", "failed", 0.1, "why"]' in last and "the table" in last
    assert "agree-cuda" in last[last.index("verdicts:") :]
    assert len(list((tmp_path / "root/out").iterdir())) <= 8


@pytest.mark.full("the script for a GPU")
def test_gpu_script_without_an_engine(gpu_script):
    done, found, asked = gpu_script(AGREE="0")
    assert done.returncode == 0 and found["agree-cuda"].startswith("exit 2 ")
    assert "--backend triton --out" in asked and "-k triton and" in asked
    assert "cuda does not agree at all" in found
    done, found, _ = gpu_script(AGREE="0", STOP="1")
    assert done.returncode == 1 and not any(name.startswith("steps") for name in found)
    assert "verdicts:" in done.stdout


@pytest.mark.full("the script for a GPU")
def test_gpu_script_ends_what_hangs(gpu_script):
    done, found, _ = gpu_script(HANGS="resnet50", TOTAL="8")
    assert "(over" in found["steps-float32-resnet50"]
    assert found["steps-float32-vit_b"] == "no time left"
    assert "the table" not in done.stdout and "verdicts:" in done.stdout


@pytest.mark.full("the script for a GPU")
def test_gpu_script_s_papers(gpu_script, tmp_path):
    """The language model and CIFAR-10 run beside each other; a hang costs one of them."""
    done, found, asked = gpu_script("papers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["char_gpt"].endswith("trained char_gpt") and "unpack" in found
    assert found["singh_cifar10-50"].endswith("trained singh_cifar10_50000")
    out = tmp_path / "root/out"
    kept = {"char_gpt.json", "singh_cifar10.json", "singh_cifar10_50000.json"}
    assert kept <= {path.name for path in out.iterdir()} and len(list(out.iterdir())) <= 8
    assert "unpack.py build/gpu-data" in asked and "--data build/gpu-data" in asked
    done, found, asked = gpu_script("papers", HANGS="char_gpt", TOTAL="16", DATA="there")
    assert "(over" in found["char_gpt"] and found["singh_cifar10-60"].startswith("exit 0")
    assert "--data there" in asked and "unpack" not in found
    assert not (out / "char_gpt.json").exists() and (out / "singh_cifar10.json").exists()


def test_gpu_script_refuses_what_it_does_not_know():
    done = bash("bench/gpu.sh", "--fast")
    assert done.returncode == 2 and "--dry-run" in done.stdout


def test_variants_of_the_engine_fit_its_sources(tmp_path):
    """Every change applies to csrc/ as it is, and leaves it otherwise."""
    variants = importlib.import_module("bench.variants.__main__")
    found = variants.read_variants()
    assert len(found) > 3 and found["as-it-is"] == []
    for name, changes in found.items():
        sources = tmp_path / name
        shutil.copytree(variants.ROOT / "csrc", sources)
        variants.change(sources, changes)
        for file, old, new in changes:
            assert new in (sources / file).read_text() and old not in (sources / file).read_text()
    with pytest.raises(SystemExit, match="has not one"):
        variants.change(sources, [variants.Change("core.h", "not there", "")])
