"""The papers' experiments: a runner that resumes, and every experiment in small."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_packages  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from data_folders import (
    cifar10_folder,
    cifar100_folder,
    cora_folder,
    imagenet_folder,
    mnist_folder,
    tiny_imagenet_folder,
)
from torch import nn

from bench import train as training
from bench.config import Config
from bench.papers import (
    backmatching_vgg,
    curvature_autoencoder,
    curvature_cnn,
    curvature_gcn,
    curvature_line,
    layca_adaptive,
    layca_alpha,
    layca_toy,
    runner,
    singh_cifar10,
    singh_imagenet,
    singh_mnist,
)
from bench.papers.store import Store
from bench.trainer import Task

pytestmark = pytest.mark.full("experiments")


CPU = ("--scale", "cpu")


# --- the runner ---

SHORT = ("--iterations", "4", "--seeds", "2", "--only", "SGD")


def singh(folder: Path, out: Path, *argv: str) -> Store:
    return singh_mnist.run(["--data", str(folder), "--out", str(out), *(argv or SHORT)])


def timeless(store: Store) -> object:
    """All that must be the same in a repeated run."""
    runs = [run for arm in store.arms for run in store.runs(arm)]
    for record in [record for run in runs for record in run["records"]]:
        del record["seconds"]
    return [[run["records"], run["losses"], run["rotation"], run["rates"]] for run in runs]


def test_results_hold_what_a_reader_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = singh(mnist_folder(tmp_path / "data"), tmp_path)
    assert store.arms == ["SGD", "SGD + singh"]
    content = json.loads((tmp_path / "singh_mnist.json").read_text())
    assert content["machines"][0]["torch"] == torch.__version__
    assert content["data"]["train"] == 6 and "Caffe" in content["network"]
    arm = content["arms"]["SGD + singh"]
    assert arm["settings"]["lr"] == 0.01 and arm["settings"]["rule"] == "singh"
    run = arm["runs"]["1"]
    assert [record["step"] for record in run["records"]] == [1, 2, 3, 4]
    assert len(run["losses"]["loss"]) == 4 and run["rates"]["names"][0] == "conv1"
    assert arm["runs"]["0"]["losses"] != run["losses"]
    text = capsys.readouterr().out
    assert "| iteration |" in text and str(tmp_path / "singh_mnist.png") in text
    assert (tmp_path / "singh_mnist.md").read_text().count("\n") == 2 + 2 + 4
    assert (tmp_path / "singh_mnist.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mnist_folder(tmp_path / "data")
    whole = singh(folder, tmp_path / "whole")
    done: list[str] = []

    def interrupted(config: Config, *rest: object, **more: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(config.name)
        return training.train(config, *rest, **more)

    monkeypatch.setattr(runner, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        singh(folder, tmp_path)
    stored = Store.load(tmp_path / "singh_mnist.json")
    assert [len(stored.runs(arm)) for arm in ("SGD", "SGD + singh")] == [2, 1]
    done.clear()
    resumed = singh(folder, tmp_path)
    assert len(done) == 1 and "singh-seed1" in done[0]
    assert timeless(resumed) == timeless(whole)
    singh(folder, tmp_path)
    assert len(done) == 1  # nothing left to do
    singh(folder, tmp_path, "--iterations", "4", "--seeds", "3", "--only", "SGD$")
    assert len(done) == 2 and done[1].endswith("none-seed2")


def test_a_killed_run_loses_one_pair_at_most(tmp_path: Path) -> None:
    folder, path = mnist_folder(tmp_path / "data"), tmp_path / "out" / "singh_mnist.json"
    command = [sys.executable, "-m", "bench.papers.singh_mnist", "--data", str(folder)]
    command += ["--out", str(path.parent), "--iterations", "30", "--seeds", "200", "--only", "SGD$"]
    root = Path(runner.__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (path.exists() and Store.load(path).runs("SGD")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished = len(Store.load(path).runs("SGD"))
    store = singh(
        folder, path.parent, "--iterations", "30", "--seeds", str(finished + 1), "--only", "SGD$"
    )
    assert len(store.runs("SGD")) == finished + 1


def test_other_settings_and_other_data_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = mnist_folder(tmp_path / "data")
    singh(folder, tmp_path)
    for argv, message in (
        (("--iterations", "5", "--only", "SGD"), "steps was 4, now 5: choose another --out"),
        (("--iterations", "4", "--batch", "2", "--only", "SGD"), "batch was 64, now 2"),
        (("--iterations", "4", "--items", "2"), "data was"),
        (("--only", "Adam"), "no arm matches 'Adam'"),
        (("--only", "("), "unterminated subpattern"),
        ((*SHORT[:2], "--seeds", "3", "--device", "abacus"), "device 'abacus' cannot be used"),
        (("--seeds", "0"), "must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            singh(folder, tmp_path, *argv)
        assert message in capsys.readouterr().err
    (tmp_path / "singh_mnist.json").write_text('{"exper')
    with pytest.raises(SystemExit):
        singh(folder, tmp_path)
    assert "singh_mnist.json: not a results file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        singh(tmp_path / "nowhere", tmp_path)
    assert "nowhere" in capsys.readouterr().err


def test_a_diverged_arm_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = cifar10_folder(tmp_path)

    def experiment(_: argparse.Namespace) -> runner.Experiment:
        def arms(scope: runner.Scope) -> list[runner.Arm]:
            return [runner.Arm("wild", scope.config(model="mlp", lr=1e30))]

        budget = runner.Budget(seeds=1, batch=4, epochs=3)
        return runner.Experiment("wild", "cifar10", "mlp", budget, budget, arms)

    store = runner.main(None, experiment, ["--data", str(folder), "--out", str(tmp_path)])
    assert store.runs("wild")[0]["final"]["diverged"] and store.settings("wild")["steps"] == 15
    assert "wild (1 of 1 diverged)" in (tmp_path / "wild.md").read_text()
    assert "100%" in capsys.readouterr().err


def test_rates_are_searched_once_on_held_out_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, trained = cifar10_folder(tmp_path / "data"), []
    rates = [1e30, 0.01]

    def experiment(_: argparse.Namespace) -> runner.Experiment:
        def arms(scope: runner.Scope) -> list[runner.Arm]:
            config = scope.config(model="mlp")
            search = runner.Search("both", config, tuple(rates))
            found = [runner.Arm(f"alpha {a}", replace(config, alpha=a)) for a in (0.0, 0.5)]
            return [replace(arm, search=search) for arm in found]

        budget = runner.Budget(seeds=2, batch=4, iterations=3)
        return runner.Experiment("searched", "cifar10", "mlp", budget, budget, arms)

    def noted(config: Config, task: Task, **more: object) -> object:
        trained.append((config.lr, config.holdout, len(task.data.x)))
        return training.train(config, task, **more)

    monkeypatch.setattr(runner, "train", noted)
    argv = ["--data", str(folder), "--out", str(tmp_path)]
    store = runner.main(None, experiment, argv)
    whole = trained[-1][2]
    kept = whole - whole // 3
    assert trained[:2] == [(1e30, True, kept), (0.01, True, kept)]
    assert trained[2:] == [(0.01, False, whole)] * 4
    assert [store.settings(arm)["lr"] for arm in store.arms] == [0.01, 0.01]
    assert Store.load(tmp_path / "searched_rates.json").runs("both, rate 1e+30")
    runner.main(None, experiment, argv)
    assert len(trained) == 6  # nothing left to do
    rates.pop()
    (tmp_path / "searched_rates.json").unlink()
    for more, message in (
        ([], "both: every rate of (1e+30,) diverged"),
        (["--scale", "cpu"], "searched has no preset for a CPU: leave --scale away"),
    ):
        with pytest.raises(SystemExit):
            runner.main(None, experiment, [*argv, *more])
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_task_brings_its_optimizer_and_no_error(tmp_path: Path) -> None:
    """What an autoencoder with curvature needs: its own optimizer, a loss alone, a second graph."""
    seen: list[bool] = []
    made: list[nn.Module] = []

    class Curved(torch.optim.SGD):
        is_second_order = True

        def step(self, closure: object = None) -> None:
            seen.append(self.param_groups[0]["params"][0].grad.requires_grad)
            super().step()

    def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
        made.append(model)
        return Curved(model.parameters(), lr=config.rate)

    def arms(scope: runner.Scope) -> list[runner.Arm]:
        def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (output**4).mean()

        task = runner.network(
            lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)),
            loss=loss,
            error=None,
            optimizer=optimizer,
        )
        return [runner.Arm("curved", scope.config(lr=1e-4), task)]

    def experiment(_: argparse.Namespace) -> runner.Experiment:
        budget = runner.Budget(seeds=2, batch=4, iterations=3)
        return runner.Experiment("curved", "cifar10", "linear", budget, budget, arms)

    folder = cifar10_folder(tmp_path)
    store = runner.main(None, experiment, ["--data", str(folder), "--out", str(tmp_path)])
    assert seen == [True] * 6 and store.metric == "test_loss"
    # A gradient and its graph hold each other: none is left to leak.
    assert all(p.grad is None for model in made for p in model.parameters())
    assert "model" not in store.settings("curved")
    assert "test loss" in (tmp_path / "curved.md").read_text()


# --- every experiment, from end to end ---

EXPERIMENTS = {
    "singh_mnist": (singh_mnist, mnist_folder, ("--iterations", "2", "--also", "0.02")),
    "singh_cifar10": (singh_cifar10, cifar10_folder, ("--iterations", "2", "--batch", "4")),
    "singh_cifar10_50000": (
        singh_cifar10,
        cifar10_folder,
        ("--iterations", "2", "--batch", "4", "--step-down", "50000", "--only", "NAG"),
    ),
    "singh_imagenet": (
        singh_imagenet,
        imagenet_folder,
        ("--iterations", "1", "--batch", "2", "--only", "singh"),
    ),
    "layca_toy": (layca_toy, mnist_folder, ("--epochs", "3", "--layers", "1", "10")),
    "layca_toy_frozen": (
        layca_toy,
        mnist_folder,
        ("--iterations", "3", "--layers", "8", "10", "--frozen-feedback"),
    ),
    "layca_alpha_c10": (
        layca_alpha,
        cifar10_folder,
        ("--iterations", "2", "--batch", "4", "--alphas", "-0.5", "0"),
    ),
    "layca_alpha_c100": (
        layca_alpha,
        cifar100_folder,
        ("--task", "c100", "--epochs", "1", "--batch", "3", "--alphas", "0.5", "--only", "Layca"),
    ),
    "layca_alpha_tiny": (
        layca_alpha,
        tiny_imagenet_folder,
        ("--task", "tiny", "--iterations", "1", "--batch", "2", "--alphas", "0"),
    ),
    "layca_adaptive": (
        layca_adaptive,
        cifar10_folder,
        ("--iterations", "1", "--batch", "4", "--items", "4", "--only", "^Adam|SGD$"),
    ),
    "curvature_autoencoder": (
        curvature_autoencoder,
        mnist_folder,
        ("--iterations", "2", "--only", "rate 0.001|curvature"),
    ),
    "curvature_cnn": (curvature_cnn, cifar10_folder, ("--iterations", "2", "--batch", "4")),
    "curvature_cnn_0.25": (
        curvature_cnn,
        cifar10_folder,
        ("--epochs", "1", "--batch", "8", "--width", "0.25"),
    ),
    "curvature_gcn": (curvature_gcn, cora_folder, ("--epochs", "3")),
    "curvature_line": (curvature_line, cifar10_folder, ("--iterations", "2", "--batch", "4")),
    "curvature_line_autoencoder": (
        curvature_line,
        mnist_folder,
        ("--iterations", "2", "--autoencoder"),
    ),
    "backmatching_vgg_0.0625": (
        backmatching_vgg,
        cifar10_folder,
        ("--iterations", "2", "--batch", "4", "--width", "0.0625"),
    ),
}


# The presets for a CPU: other networks, other data, rates that are searched.
EXPERIMENTS |= {
    f"{name}_cpu": (module, folder, (*CPU, *argv))
    for name, (module, folder, argv) in {
        "singh_mnist": (singh_mnist, mnist_folder, ("--iterations", "1", "--only", "^SGD")),
        "layca_toy": (layca_toy, mnist_folder, ("--epochs", "2")),
        "layca_alpha_c10": (
            layca_alpha,
            cifar10_folder,
            ("--iterations", "1", "--batch", "4", "--alphas", "0", "0.3"),
        ),
        "layca_adaptive": (
            layca_adaptive,
            cifar10_folder,
            ("--iterations", "1", "--batch", "4", "--only", "^SGD"),
        ),
        "curvature_autoencoder": (
            curvature_autoencoder,
            mnist_folder,
            ("--iterations", "2", "--only", "rate 0.001|curvature, fisher$"),
        ),
        "backmatching_vgg": (
            backmatching_vgg,
            cifar10_folder,
            ("--iterations", "1", "--batch", "4", "--only", "rate 0.01"),
        ),
    }.items()
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_rehearses(tmp_path: Path, name: str) -> None:
    module, folder, argv = EXPERIMENTS[name]
    out = tmp_path / "out"
    where = ["--data", str(folder(tmp_path / "data")), "--out", str(out), "--quick"]
    store = module.run([*where, *argv])
    searched = ["_rates.json"] if (out / f"{name}_rates.json").exists() else []
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}{s}" for s in (".json", ".md", ".png", *searched)
    ]
    assert store.arms and store.settings(store.arms[0])["steps"] <= 3
    assert all(len(store.runs(arm)) == 1 for arm in store.arms)
    text = (out / f"{name}.md").read_text()
    assert text.count("|") > 10 and "nan" not in text
    # Bare and ruled arms start from the same weights and see the same examples.
    starts = {run["losses"]["loss"][0] for arm in store.arms for run in store.runs(arm)}
    assert max(starts) == pytest.approx(min(starts), rel=1e-4)


def test_the_minimum_along_a_step() -> None:
    """Of a parabola; without one there is none."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 4.0)
    data = SimpleNamespace(x=torch.ones(7, 1), y=torch.ones(7, 1))
    trainer = SimpleNamespace(model=model, data=data, task=SimpleNamespace(loss=F.mse_loss))
    assert curvature_line.minimum(trainer, [torch.zeros(1, 1)]) == pytest.approx(0.25)
    assert model.weight.item() == 4.0
    trainer.task.loss = lambda output, y: -F.mse_loss(output, y)
    assert math.isnan(curvature_line.minimum(trainer, [torch.zeros(1, 1)]))
