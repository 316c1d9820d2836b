"""The command lines of the runner and of the demo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bench_packages  # noqa: F401
import pytest
import torch

from bench import demo, step_time
from bench import train as runner
from bench.data import load
from bench.record import Result

# --- command lines ---


TINY = ["--steps", "6", "--model", "mlp", "--optimizer", "adam", "--rule", "layca"]


def test_help_shows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "data",
        "folder",
        "model",
        "optimizer",
        "rule",
        "alpha",
        "schedule",
        "steps",
        "seeds",
        "device",
        "out",
        "resume",
        "weight-decay",
        "backend",
    ):
        assert f"--{flag} " in text


def test_command_line_run_stop_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    (straight,) = runner.main([*TINY, "--out", str(tmp_path / "straight")])
    stopped = runner.main([*TINY, *out, "--seeds", "0", "1", "--stop", "3"])
    assert [r.final["steps"] for r in stopped] == [3, 3]
    resumed = runner.main([*TINY, *out, "--seeds", "0", "1", "--resume"])
    assert [r.final["steps"] for r in resumed] == [6, 6]
    assert resumed[0].losses == straight.losses != resumed[1].losses
    written = json.loads((tmp_path / f"{straight.name}.json").read_text())
    assert written["config"]["lr"] == 3.0**-5 and written["machine"]["torch"] == torch.__version__
    assert (tmp_path / f"{straight.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "over 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "alexnet"], "invalid choice"),
        (["--rule", "larks", "--lr", "0.1"], "larks"),
        (["--data", "mnist"], "needs a folder"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- the demo ---


def made(error: float, rule: str, lr: float = 0.1) -> Result:
    final = {"test_error": error, "diverged": False, "train_loss": 0.5, "step_ms": 1.0}
    return Result(rule, {"lr": lr}, final | {"optimizer_ms": 0.25})


def test_table_and_verdict() -> None:
    rows = [
        (
            "SGD",
            [
                ("none", [made(0.02, "none"), made(0.04, "none")]),
                ("layca", [made(0.01, "layca"), made(0.02, "layca")]),
            ],
        ),
        ("Adam", [("none", [made(0.01, "none")]), ("layca", [made(0.03, "layca")])]),
    ]
    text = demo.table(rows)
    assert "3.00 ± 1.41" in text and "SGD + layca" in text and "0.250" in text
    said = demo.verdict(rows)
    assert "on 1 of 2 directions" in said and "SGD -1.50" in said and "Adam +2.00" in said


def test_demo_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = (("SGD", "sgd", ("none", "singh", "layca")), ("Adam", "adam", ("none", "layca")))
    monkeypatch.setattr(demo, "PLAN", plan)
    monkeypatch.setattr(step_time, "quick", lambda: print("micro-benchmark"))
    demo.main(["--out", str(tmp_path), "--steps", "12", "--seeds", "0", "1", "--workers", "2"])
    text = capsys.readouterr().out
    assert text.endswith("micro-benchmark\n")
    for line in ("SGD + singh", "SGD + layca", "Adam + layca"):
        assert line in text
    for picture in ("loss.png", "rotation.png"):
        assert str(tmp_path / picture) in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "runs").glob("*.json"))) == 10
    # Twins start from the same weights and see the same images; processes change no bit.
    first = [Result.load(p).losses[0] for p in (tmp_path / "runs").glob("*seed0.json")]
    assert len(set(first)) == 1
    config = replace(demo.base_config(None, 12), optimizer="adam", rule="layca", seed=1)
    assert (
        runner.train(config).losses == Result.load(tmp_path / "runs" / f"{config.name}.json").losses
    )


def test_demo_answers_a_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_grid_looks_at_the_train_set_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BARE_RATES", {"sgd": 0.1})
    monkeypatch.setattr(demo, "GRID", (1e-6, 0.1))
    data = load("digits")
    spoilt = replace(data, test_y=(data.test_y + 1) % 10)
    base = replace(demo.base_config(None, 60), model="mlp")
    found = demo.run_grid(base, spoilt, seeds=(0,))
    assert found["sgd"][0.1] < 20 < found["sgd"][1e-6]
    assert "sgd" in demo.grid_table(found)
