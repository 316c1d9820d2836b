"""Several runs trained as one, runs in processes of their own, text as data."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="reports are drawn by it")
pytest.importorskip("tqdm", reason="training shows its progress by it")
pytest.importorskip("rich", reason="tables are printed by it")

import torch.nn.functional as F
from data_folders import cifar10_folder
from torch import nn

from bench.config import Config
from bench.data import Data, DataError, load
from bench.fleet import train_together
from bench.papers import char_gpt, char_gpt_norms, char_gpt_report, gpt, runner, workers
from bench.papers.runner import network
from bench.papers.store import Store
from bench.record import Result
from bench.train import train

pytestmark = pytest.mark.full("experiments")


def text_folder(folder: Path, copies: int = 60) -> Path:
    (folder / "text").mkdir(parents=True)
    line = "To be, or not to be, that is the question:\n"
    (folder / "text" / "tiny_shakespeare.txt").write_text(line * copies)
    return folder


# --- text ---


def test_windows_of_text(tmp_path: Path) -> None:
    data = load("tiny_shakespeare", text_folder(tmp_path))
    whole, cut = 60 * 43, 60 * 43 * 9 // 10
    assert data.x.shape == (cut - 64, 64) and data.shape == (64,)
    assert data.x[5][1:].equal(data.y[5][:-1]) and data.x[6].equal(data.y[5])
    assert len(data.test_x) == (whole - cut - 1) // 64 and data.classes == int(data.x.max()) + 1
    letters = sorted(set("To be, or not to be, that is the question:\n"))
    assert "".join(letters[i] for i in data.x[0]).startswith("To be, or not")
    with pytest.raises(DataError, match="too few"):
        load("tiny_shakespeare", text_folder(tmp_path / "short", copies=2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load("tiny_shakespeare", tmp_path / "empty")


# --- the network ---


def test_gpt_sees_no_future() -> None:
    torch.manual_seed(0)
    model = gpt.GPT((8,), 11, width=16, depth=2)
    x = torch.randint(11, (3, 8), dtype=torch.uint8)
    before, other = model(x), x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    after = model(other)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])
    # Attention is torch's.
    block, h = model.blocks[0], torch.randn(3, 8, 16)
    q, k, v = block.qkv(h).view(3, 8, 12, 4).transpose(1, 2).chunk(3, 1)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(block.attend(h), theirs.transpose(1, 2).reshape(3, 8, 16))
    deviations = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    assert deviations["blocks.0.up.weight"] == pytest.approx(0.02, rel=0.2)
    assert deviations["blocks.0.down.weight"] == pytest.approx(0.01, rel=0.2)
    assert sum(gpt.matrix(name) for name in deviations) == 8


# --- several runs as one ---


def task_of(data: Data) -> Callable[[Config], Any]:
    make = network(
        partial(gpt.GPT, width=8, depth=1),
        loss=gpt.loss,
        error=None,
        optimizer=char_gpt.optimizer,
    )
    return lambda config: make(config, data)


def test_together_is_one_by_one(tmp_path: Path) -> None:
    task = task_of(load("tiny_shakespeare", text_folder(tmp_path)))
    base = Config(
        data="tiny_shakespeare",
        optimizer="adamw",
        lr=0.01,
        weight_decay=0.1,
        clip=0.5,
        schedule="warmup",
        batch=4,
        steps=30,
        eval_every=10,
        monitor_every=0,
    )
    configs = [
        base,
        replace(base, seed=1, lr=0.003),
        replace(base, rule="layca", plain_lr=0.002),
        replace(base, optimizer="muon", plain_lr=0.002, clip=None),
        replace(base, optimizer="momentum", rule="lars", lr=1.0, weight_decay=0.0),
    ]
    results = train_together(configs, [task(config) for config in configs])
    for config, ours in zip(configs, results, strict=True):
        theirs = train(config, task(config))
        assert ours.losses == pytest.approx(theirs.losses, rel=2e-3)
        assert ours.losses[-1] < ours.losses[0] - 0.05
        assert [r["step"] for r in ours.records] == [10, 20, 30]
        assert ours.final["test_loss"] == pytest.approx(theirs.final["test_loss"], rel=2e-3)
        assert ours.final["complete"] and not ours.final["diverged"]
        assert ours.final["parameters"] == theirs.final["parameters"]
    assert len({result.losses[-1] for result in results}) == len(results)


def test_one_run_that_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    task = task_of(load("tiny_shakespeare", text_folder(tmp_path)))
    sound = Config(optimizer="adamw", lr=0.01, batch=4, steps=8, eval_every=4, monitor_every=0)
    wild = replace(sound, lr=1e38)
    alone = train_together([sound], [task(sound)])[0]
    ours, theirs = train_together([sound, wild], [task(sound), task(wild)])
    assert theirs.final["diverged"] and theirs.final["steps"] == 4 == len(theirs.losses)
    assert not ours.final["diverged"]
    assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
    with pytest.raises(ValueError, match="differ in steps"):
        train_together([sound, replace(sound, steps=9)], [task(sound)] * 2)
    other = replace(task(sound), model=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="differ in their parameters"):
        train_together([sound, sound], [task(sound), other])


# --- processes ---


class Jobs:
    def __init__(self, jobs: list[str]) -> None:
        self.jobs, self.found, self.why = jobs, [], {}

    def next(self) -> str | None:
        return self.jobs.pop(0) if self.jobs else None

    def done(self, job: str, results: Any) -> None:
        self.found.append((job, results))

    def failed(self, job: str, why: str) -> None:
        self.why[job] = why


def work(job: str) -> str:
    if job == "hang":
        time.sleep(600)
    if job == "die":
        os._exit(7)
    if job == "raise":
        raise ValueError("no such job")
    return job.upper()


def prepare() -> Callable[[str], str]:
    return work


def broken() -> Callable[[str], str]:
    raise RuntimeError("nothing to work with")


def test_a_hang_a_crash_and_an_error_cost_one_job_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START", 20.0)
    jobs = Jobs(["a", "hang", "b", "die", "c", "raise", "d", "e"])
    begun = time.monotonic()
    workers.run(jobs, prepare, 2, limit=1.0)
    assert sorted(jobs.found) == [(name, name.upper()) for name in "abcde"]
    assert set(jobs.why) == {"hang", "die", "raise"}
    assert "more than 1 s" in jobs.why["hang"] and jobs.why["die"].endswith("with 7")
    assert "ValueError: no such job" in jobs.why["raise"]
    assert time.monotonic() - begun < 120
    jobs = Jobs(["a", "b"])
    workers.run(jobs, broken, 1, limit=1.0)
    assert not jobs.found and "nothing to work with" in jobs.why["b"]


def failing_once(job: runner.Job, data: Data, after_step: runner.AfterStep) -> list[Result]:
    """Of the second seed once, of the first rate always."""
    ((_, config),) = job
    marker = Path(os.environ["MARKER"])
    if config.lr == 1.0 or (config.seed == 1 and not marker.exists()):
        marker.touch()
        raise ValueError("no such luck")
    return runner.one_by_one(job, data, after_step)


def unlucky(_: argparse.Namespace) -> runner.Experiment:
    def arms(scope: runner.Scope) -> list[runner.Arm]:
        rates = {"wild": 1.0, "sound": 0.01}
        return [runner.Arm(n, scope.config(model="mlp", lr=rate)) for n, rate in rates.items()]

    budget = runner.Budget(seeds=2, batch=4, iterations=2)
    return runner.Experiment("unlucky", "cifar10", "mlp", budget, budget, arms, train=failing_once)


def test_a_job_that_fails_gets_a_second_try(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    argv = ["--data", str(cifar10_folder(tmp_path / "data")), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        runner.main(None, unlucky, [*argv, "--workers", "2"])
    said = capsys.readouterr()
    assert "2 jobs failed; wild: ValueError: no such luck" in said.err
    assert said.out.count("FAILED wild") + said.err.count("FAILED wild") == 4
    store = Store.load(tmp_path / "unlucky.json")
    assert store.arms == ["sound"] and len(store.runs("sound")) == 2


# --- the experiment ---


def test_initial_norms(tmp_path: Path, monkeypatch) -> None:
    """The blocks' matrices start as much larger; the rest is left to AdamW's rate from GPT-2's."""
    torch.manual_seed(0)
    small = gpt.GPT((4,), 5, width=8, depth=1)
    torch.manual_seed(0)
    for (name, p), q in zip(
        gpt.GPT((4,), 5, width=8, depth=1, norms=4).named_parameters(),
        small.parameters(),
        strict=True,
    ):
        assert torch.equal(p, 4 * q if gpt.matrix(name) else q)
    folder = text_folder(tmp_path / "data", copies=80)
    monkeypatch.setattr(char_gpt, "_size", lambda options: (8, 2))
    argv = ["--data", str(folder), "--quick", "--iterations", "2", "--seeds", "1"]
    argv += ["--only", "^(AdamW, decay|Adam . hyper)", "--out", str(tmp_path / "out")]
    store = char_gpt_norms.run(argv)
    found = char_gpt_report.families(store)
    assert set(found) == {
        *(f"AdamW, decay 0.1, norms x{norms}" for norms in (1, 4)),
        *(f"Adam + hyperball, plain rest, norms x{norms}" for norms in (1, 2, 4, 8)),
    }
    best = char_gpt_report.best_rate(found["AdamW, decay 0.1, norms x1"])
    plain = {store.settings(arm)["plain_lr"] for arm in store.arms if "hyperball" in arm}
    assert plain == {best} and (tmp_path / "out/char_gpt_norms.png").exists()


def test_the_language_model_in_processes_and_alone(tmp_path: Path, monkeypatch) -> None:
    """Arms follow from results, whoever trains them; the same runs either way."""
    folder = text_folder(tmp_path / "data", copies=80)
    monkeypatch.setattr(char_gpt, "_size", lambda options: (8, 2))
    argv = ["--data", str(folder), "--quick", "--iterations", "2", "--seeds", "2"]
    families = r"^(AdamW, (decay|two)|Adam \+ layca, plain|Muon, plain)"
    argv += ["--only", families]
    alone = char_gpt.run([*argv, "--out", str(tmp_path / "alone"), "--together"])
    assert set(char_gpt_report.families(alone)) == {
        *(family.title for family in char_gpt.ADAMW),
        "AdamW, two rates",
        "Adam + layca, plain rest",
        "Muon, plain rest",
    }
    assert len(char_gpt_report.sizes(alone)) == 4
    chosen = alone.settings(
        char_gpt_report.arm_of(
            alone,
            (reference := char_gpt_report.adamw(alone)),
            char_gpt_report.best_rate(char_gpt_report.families(alone)[reference]),
        )
    )["lr"]
    plain = {alone.settings(a)["plain_lr"] for a in alone.arms if not a.startswith("AdamW, decay")}
    assert plain == {chosen}
    assert all(len(alone.runs(arm)) == 2 for arm in alone.arms)
    assert (tmp_path / "alone/char_gpt.png").exists()
    argv[-1] = "^AdamW, decay 0.1"
    apart = char_gpt.run([*argv, "--out", str(tmp_path / "apart"), "--workers", "2"])
    assert len(apart.arms) == 5
    for arm in apart.arms:
        assert apart.last(arm) == pytest.approx(alone.last(arm), rel=1e-5)


def test_valleys_and_steps() -> None:
    curve = {1.0: {"0": 2.0}, 2.0: {"0": 1.0}, 4.0: {"0": 1.025}, 8.0: {"0": 1.125}}
    # From 2 to 4 an octave, then a quarter of one, and a twentieth before.
    assert char_gpt_report.octaves(curve, "0") == pytest.approx(1 + 0.25 + 0.05)
    assert char_gpt_report.best_rate(curve) == 2.0
    records = [{"step": s, "test_loss": v} for s, v in ((10, 3.0), (20, 2.0), (30, 1.5))]
    assert char_gpt_report.steps_to({"records": records}, 1.75) == 25
    assert char_gpt_report.steps_to({"records": records}, 3.5) == 10
    assert char_gpt_report.steps_to({"records": records}, 1.0) == float("inf")
