"""The benchmarks on a GPU, as far as they can be seen without one: timer, memory, checks."""

import importlib
import shutil
import weakref

import pytest
import torch

import layerlr.backends.cuda
from bench import (
    agree,
    measure,
    memory,
    peers,
    repeat,
    report,
    sanitize_step,
    small,
    step_time,
    timing,
    tune,
)
from layerlr import agreement

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
