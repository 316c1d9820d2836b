"""The step-time benchmark: its shapes, its rounds, and a small run from end to end."""

import builtins
import csv
import importlib
import importlib.util
import json
import math
from dataclasses import fields

import pytest
import torch

from bench import builds, goals, peers, progress, report, shapes, step_time, timing


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", shapes.MODELS)
def test_shapes_have_the_totals_of_the_architectures(model):
    _, tensors, _ = shapes.MODELS[model]
    assert len(shapes.shapes(model)) == tensors


def test_defaults_are_models():
    for models in shapes.DEFAULTS.values():
        assert set(models) <= set(shapes.MODELS)
    assert set(goals.GPU_TINY) == set(shapes.TINY)
    assert {*goals.GPU_ONCE, *goals.GPU_TWICE, *goals.GPU_TINY} == set(shapes.DEFAULTS["cuda"])


def test_bytes_by_design():
    by_name = {c.name: c for c in peers.contenders("sgd")}
    # torch keeps its momentum in the dtype of the weights, layerlr in float32.
    assert by_name["torch SGD fused"].bytes_per_param(torch.bfloat16) == 10
    assert by_name["layerlr SGD None"].bytes_per_param(torch.bfloat16) == 14
    assert by_name["layerlr SGD layca"].bytes_per_param(torch.float32) == 28
    assert by_name["layerlr SGD layca"].once_bytes_per_param(torch.float32) == 20
    assert by_name["timm Lars foreach"].bytes_per_param(torch.float32) is None
    reference = by_name["layerlr SGD layca reference"]
    assert reference.bytes_per_param(torch.float32) is None
    assert reference.once_bytes_per_param(torch.float32) == 20


def test_every_goal_names_a_contender():
    names = {c.name for family in peers.BASELINES for c in peers.contenders(family)}
    assert {name for limits in goals.RATIO_LIMITS.values() for name in limits} <= names
    assert {name for name, _ in goals.PEER_FACTORS.values()} <= names
    assert {*peers.BASELINES.values(), *peers.STREAM.values()} <= names
    backends = step_time.BACKENDS["cuda"].split(",")
    names = {c.name for f in peers.BASELINES for c in peers.contenders(f, backends, "cuda")}
    assert {*goals.GPU_OURS, *goals.GPU_PEERS.values(), *peers.STREAM.values()} <= names
    assert {f"{name} reference" for name in goals.GPU_OURS} <= names


def test_every_precision_is_a_contender():
    """And runs."""
    names = [c.name for c in peers.contenders("held") if c.package == "layerlr"]
    assert len(names) == 8 and "layerlr AdamW layca master" in names
    params = [torch.ones(4, 4, dtype=torch.bfloat16)]
    params[0].grad = torch.ones_like(params[0])
    for c in peers.contenders("held"):
        if c.package == "layerlr":
            opt = c.build(params)
            opt.step()
            assert (opt.param_groups[0]["precision"] or "nearest") == c.name.split()[-1]


def test_rounds_are_interleaved_and_restored():
    seen: list[str] = []
    restored: list[str] = []

    def lane(name: str) -> timing.Lane:
        return timing.Lane(name, lambda: seen.append(name), lambda: restored.append(name))

    lanes = [lane(name) for name in "abc"]
    timing.run_rounds(lanes, 20, lambda step, n: timing.Sample(step() or 1.0))
    timed = seen[-60:]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, 60, 3)]
    assert all(set(turn) == set("abc") for turn in rounds)
    assert len(set(rounds)) > 1, "the order never changed"
    assert restored[-60:] == timed
    assert all(lane.seconds == [1.0] * 20 for lane in lanes)


def test_ratios_are_taken_within_a_round():
    quiet_then_busy = timing.Lane("base", print, seconds=[1.0, 10.0, 1.0])
    twice = timing.Lane("twice", print, seconds=[2.0, 20.0, 2.0])
    assert timing.ratios(twice, quiet_then_busy) == timing.Spread(2.0, 2.0, 2.0)


def test_slow_lanes_drop_out_early():
    quick, slow = timing.Lane("quick", lambda: 0.001), timing.Lane("slow", lambda: 1.0)
    timer = lambda step, n: timing.Sample(step(), 0.0)  # noqa: E731
    ticks = []
    timing.run_rounds([quick, slow], 9, timer, lane_seconds=2.0, tick=lambda: ticks.append(1))
    assert len(quick.seconds) == len(quick.host) == 9 and len(slow.seconds) == 3
    assert len(ticks) == 18
    assert timing.ratios(slow, quick).median == 1000.0


def test_a_device_without_a_timer_is_refused():
    with pytest.raises(NotImplementedError, match="no timer for 'meta'"):
        timing.timer_for(torch.device("meta"))


def test_caches_are_emptied_before_each_step_and_off_the_clock(monkeypatch):
    clock, log = [0], []
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: clock[0])

    class Buffer:
        def add_(self, _):
            clock[0] += 1000
            log.append("flush")

    monkeypatch.setattr(timing.torch, "zeros", lambda size, dtype: Buffer())

    def step():
        clock[0] += 5
        log.append("step")

    sample = timing.timer_for(torch.device("cpu"), flush=True)(step, 3)
    assert sample.seconds == pytest.approx(5e-9)
    assert log == ["flush", "step"] * 3


def test_small_run_from_end_to_end(tmp_path, capsys):
    arguments = ["--models", "tiny300", "--families", "sgd", "--repeats", "2"]
    arguments += ["--backend", "reference", "--only", "foreach|singh|in place"]
    out = tmp_path / "new" / "run.json"
    assert step_time.main([*arguments, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert set(content) == {"schema", "machine", "rows", "verdicts", "left_out"}
    assert content["schema"] == report.SCHEMA
    assert {"cpu", "cores", "threads", "torch", "layerlr", "commit"} <= set(content["machine"])
    assert content["machine"]["command"].startswith("python -m bench.step_time --models tiny300")
    rows = {row["contender"]: row for row in content["rows"]}
    assert {"torch SGD fused", "torch SGD foreach", "layerlr SGD singh"} <= set(rows)
    assert "torch SGD loop" not in rows, "--only was ignored"
    for row in rows.values():
        assert set(row) == {f.name for f in fields(report.Row)}
        assert row["rounds"] == 2 and row["seconds"]["median"] > 0
    assert rows["torch SGD fused"]["ratio"] == {"median": 1.0, "q20": 1.0, "q80": 1.0}
    assert rows["memory in place"]["ratio"] is None
    for package in ("timm", "pytorch_optimizer"):  # where it is absent, the run says so
        if importlib.util.find_spec(package) is None:
            assert any(package in name for name in content["left_out"])
    printed = capsys.readouterr().out
    assert "layerlr SGD singh" in printed and str(out) in printed


def test_csv_has_one_line_per_row(tmp_path):
    out = tmp_path / "run.csv"
    arguments = ["--models", "tiny300", "--families", "adam", "--repeats", "1"]
    step_time.main([*arguments, "--only", "AdamW loop", "--out", str(out)])
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == ["torch AdamW fused", "torch AdamW loop"]
    assert float(lines[1]["seconds_median"]) > 0 and lines[1]["torch"] == torch.__version__


def test_contender_that_fails_is_left_out_with_its_reason(monkeypatch):
    def broken(params):
        raise ValueError("no such thing")

    rows = [
        peers.Contender("torch SGD fused", "torch", builds.torch_sgd(fused=True)),
        peers.Contender("broken", "torch", broken),
        peers.Contender("idle", "torch", lambda params: torch.optim.SGD(params, lr=0.0)),
    ]
    monkeypatch.setattr(step_time, "contenders", lambda *_: rows)
    result = step_time.run(["tiny300"], families=["sgd"], repeats=1)
    assert [row.contender for row in result.rows] == ["torch SGD fused"]
    assert result.left_out["tiny300: broken"] == "ValueError: no such thing"
    assert "left the weights as they were" in result.left_out["tiny300: idle"]


def test_weights_that_blow_up_spoil_the_family_and_it_says_so(monkeypatch):
    # infinite: one step must do, for a slow machine takes few
    rows = [peers.Contender("torch SGD fused", "torch", lambda p: torch.optim.SGD(p, lr=math.inf))]
    monkeypatch.setattr(step_time, "contenders", lambda *_: rows)
    result = step_time.run(["tiny300"], families=["sgd"], repeats=1)
    assert not result.rows
    assert result.left_out == {"tiny300: all of sgd": "in the end a weight was not finite"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--models", "resnet51"],
        ["--out", "run.txt"],
        ["--threads", "2", "--clock", "cpu"],
        ["--device", "cuda"],
    ],
)
def test_wrong_arguments_are_named(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step_time.main(arguments)
    message = capsys.readouterr().err
    assert any(w in message for w in ("resnet51", "run.txt", "one thread", "no CUDA device"))


def test_verdicts():
    def row(name, package, rule, ratio):
        spread = timing.Spread(ratio, ratio, ratio)
        facts = ("resnet50", 161, 25_557_032, "float32", "sgd", name, package, rule, spread)
        return report.Row(*facts, spread, None, None, None, 1.0, 3, 1)

    rows = [
        row("layerlr SGD singh", "layerlr", "singh", 1.2),
        row("layerlr SGD lars", "layerlr", "lars", 1.6),
        row("timm Lars loop", "timm", "lars", 3.2),
    ]
    found = {v["goal"]: v for v in goals.verdicts(rows)}
    assert found["layerlr SGD singh, times torch's fused step"]["met"] is True
    assert found["layerlr SGD lars, times torch's fused step"]["met"] is False
    assert found["layerlr SGD layca, times torch's fused step"]["met"] is None
    faster = found["layerlr SGD lars, times as fast as the fastest peer's lars"]
    assert faster["value"] == 2.0 and faster["met"] is True
    assert goals.line(faster).endswith("fastest peer's lars: 2.000 >= 1.00")


def test_nothing_is_begun_when_time_is_up():
    result = step_time.run(["tiny128"], repeats=1, seconds=-1.0)
    assert result.left_out == {f"tiny128: all of {f}": "no time left" for f in ("sgd", "adam")}
    lines = report.left_out(result)
    assert lines[0] == "left out all of sgd (tiny128): no time left"


def test_packages_that_are_not_installed_share_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in builds.PEERS else find(name)
    )
    result = step_time.run(["tiny128"], repeats=1, only="foreach")
    assert "torch AdamW foreach" in {row.contender for row in result.rows}
    assert result.left_out["tiny128: timm Lars foreach"] == "timm is not installed"
    (line,) = report.left_out(result)
    assert "optional" in line and line.endswith(": timm, pytorch_optimizer")


def test_progress_without_tqdm(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    try:
        bar = importlib.reload(progress).tqdm(total=3, unit="sample")
    finally:
        monkeypatch.undo()
        importlib.reload(progress)
    with bar:
        bar.set_description("a model")
        bar.update()
        bar.total -= 1
        bar.write("a table")
    assert capsys.readouterr().out == "a table\n"


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are drawn with matplotlib")
    from bench.plot_step_time import plot

    out = tmp_path / "run.json"
    arguments = ["--models", "tiny300", "--families", "sgd", "--repeats", "1"]
    step_time.main([*arguments, "--only", "foreach", "--out", str(out)])
    assert plot(out, tmp_path / "run.png").stat().st_size > 5000


@pytest.mark.full("processes of a benchmark")
def test_sharded_step_counts_messages(tmp_path):
    from bench import sharded_step

    out = tmp_path / "x.json"
    words = ["--counts", "1", "3", "--rounds", "1", "--steps", "1", "--shape", "5", "2"]
    assert sharded_step.main([*words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["parameters"]
    for n in ("1", "3"):
        ours = [row for name, row in found[n].items() if name.startswith("layerlr")]
        assert [row["messages"] for row in ours] == [1, 1, 1]
        assert found[n][sharded_step.BASELINE]["messages"] == 0
        if importlib.util.find_spec("timm"):
            assert found[n]["timm Lars, loop"]["messages"] == 5 * int(n)
