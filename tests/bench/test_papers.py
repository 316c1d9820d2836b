"""The papers' experiments: networks and settings as published, a runner that resumes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("rich")
pytest.importorskip("PIL")

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

import layerlr
from bench import train as training
from bench.config import Config
from bench.data import Data
from bench.models import build
from bench.papers import (
    backmatching_vgg,
    by_time,
    cards,
    curvature_autoencoder,
    curvature_cnn,
    curvature_gcn,
    evidence,
    layca_adaptive,
    layca_alpha,
    layca_toy,
    measures,
    networks,
    runner,
    singh_cifar10,
    singh_imagenet,
    singh_mnist,
)
from bench.papers.store import Store
from bench.trainer import Task

pytestmark = pytest.mark.full("experiments")

TINY = Data(
    "tiny", torch.zeros(1280, 3, 32, 32), torch.zeros(1280).long(), *[torch.zeros(2)] * 2, 10
)


def arms_of(module: object, data: Data = TINY, argv: tuple[str, ...] = ()) -> dict[str, Config]:
    """The arms of an experiment in full, with the steps its budget makes of `data`."""
    parser = argparse.ArgumentParser()
    if hasattr(module, "arguments"):
        module.arguments(parser)
    parser.add_argument("--scale", default="paper")
    options = parser.parse_args(argv)
    options.quick = False
    experiment = module.experiment(options)
    budget = experiment.full if options.scale == "paper" else experiment.cpu
    base = Config(data=experiment.data, batch=budget.batch, steps=budget.steps(len(data.y)))
    return {arm.name: arm.config for arm in experiment.arms(runner.Scope(data, base, options))}


# --- settings as published ---


def test_singh_mnist_is_table_one() -> None:
    arms = arms_of(singh_mnist)
    assert list(arms) == list(singh_mnist.PAPER)
    for name, config in arms.items():
        assert (config.lr, config.weight_decay, config.batch) == (0.01, 5e-4, 64)
        assert config.steps == 2000 and config.layers == "module"
        assert (config.rule == "singh") == name.endswith("+ singh")
        group = training.Trainer(replace(config, steps=1), _images(config)).optimizer.param_groups[
            0
        ]
        assert group.get("momentum", 0.0) == (0.0 if "AdaGrad" in name else 0.9)
        assert bool(group.get("nesterov")) == ("NAG" in name)
    assert arms["SGD"].factor(1000) == pytest.approx(1.1**-0.75)
    assert arms["AdaGrad"].factor(1000) == 1
    assert singh_mnist.PAPER["AdaGrad + singh"][1800] == (1.34, 0.08)


def _images(config: Config) -> Task:
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    return Task(Data("random", x, y, x, y, 10), build("lenet", (1, 28, 28), 10, config.seed))


@pytest.mark.parametrize(("argv", "first"), [((), 60_000), (("--step-down", "50000"), 50_000)])
def test_singh_cifar10_steps_down(argv: tuple[str, ...], first: int) -> None:
    config = arms_of(singh_cifar10, argv=argv)["NAG + singh"]
    assert config.steps == first + 10_000
    at = (0, first - 1, first, first + 4_999, first + 5_000)
    assert [config.factor(step) for step in at] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_ip1_decays_250_times_as_fast() -> None:
    config = arms_of(singh_cifar10)["SGD + singh"]
    optimizer = singh_cifar10.optimizer(config, networks.cifar10_full((3, 32, 32), 10))
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert decays["conv1.weight"] == 0.004 and decays["ip1.weight"] == pytest.approx(1.0)
    assert len(decays) == 8 and optimizer.param_groups[1]["layers"] == "module"


def test_singh_imagenet_steps_down() -> None:
    arms = arms_of(singh_imagenet)
    assert {name: config.lr for name, config in arms.items()} == {"SGD": 0.01, "SGD + singh": 0.006}
    at = (99_999, 100_000, 200_000, 300_000, 349_999)
    assert [arms["SGD"].factor(step) for step in at] == pytest.approx([1, 0.1, 0.01, 1e-3, 1e-3])
    assert len(arms_of(singh_imagenet, argv=("--step-down", "50000"))["SGD"].drops) == 6


@pytest.mark.parametrize(
    ("task", "rate", "epochs", "drops"),
    [
        ("c10", 1, 100, (80, 90, 97)),
        ("c100", 1 / 3, 120, (70, 90, 105, 115)),
        ("tiny", 1 / 3, 80, (70,)),
    ],
)
def test_layca_alpha_is_as_published(
    task: str, rate: float, epochs: int, drops: tuple[int, ...]
) -> None:
    arms = arms_of(layca_alpha, argv=("--task", task))
    assert len(arms) == 26
    sgd, layca = arms["SGD, alpha 0"], arms["Layca, alpha -0.8"]
    assert sgd.lr == pytest.approx(rate) and layca.lr == 3**-3 and layca.alpha == -0.8
    assert sgd.steps == epochs * 10 and sgd.batch == 128  # 1280 examples
    for count, epoch in enumerate(drops, 1):
        assert sgd.factor(10 * epoch - 1) == pytest.approx(0.2 ** (count - 1))
        assert sgd.factor(10 * epoch) == pytest.approx(0.2**count)


def test_layca_adaptive_is_as_published() -> None:
    arms = arms_of(layca_adaptive)
    assert len(arms) == 15 and arms["SGD"].steps == 2500
    rates = {name: config.lr for name, config in arms.items() if config.rule == "none"}
    assert rates["AMomSGD"] == 0.5 and rates["Adam, no weight decay"] == 3e-4
    assert arms["Adam + Layca"].lr == 3**-5 and arms["Adagrad + Layca"].lr == 3**-3
    assert arms["SGD"].weight_decay == 5e-4 and arms["SGD + Layca"].weight_decay == 0
    assert arms["SGD"].factor(2499) == pytest.approx(0.5**9)
    assert arms["SGD + Layca"].factor(2499) == pytest.approx(0.2**3)


@pytest.mark.parametrize(
    ("module", "ways", "seeds"),
    [(curvature_autoencoder, 4, 3), (curvature_cnn, 3, 3), (curvature_gcn, 1, 10)],
)
def test_curvature_is_untuned_among_fixed_rates(module: object, ways: int, seeds: int) -> None:
    arms = arms_of(module)
    for direction in module.DIRECTIONS:
        mine = {n: c for n, c in arms.items() if re.match(rf"{direction.title}( \+|,)", n)}
        ruled = [config for config in mine.values() if config.rule == "curvature"]
        assert [c.lr for c in mine.values() if c.rule == "none"] == sorted(direction.rates)
        assert len(ruled) == ways and len(mine) == ways + len(direction.rates)
        assert {(c.lr, c.layers, c.optimizer) for c in ruled} == {
            (1, "module", direction.optimizer)
        }
        assert len({c.weight_decay for c in mine.values()}) == 1
        assert {config.factor(config.steps) for config in mine.values()} == {1}
    assert module.experiment(argparse.Namespace(width=1, scale="paper")).full.seeds == seeds
    assert Config(rule="curvature").rate == 1


def test_backmatching_and_sgd_have_the_same_rates() -> None:
    arms = arms_of(backmatching_vgg)
    assert len(arms) == 15
    bare, ruled = arms["SGD, rate 0.1"], arms["SGD + probe, rate 0.1"]
    assert ruled == replace(bare, rule="backmatching", rule_options=("estimator=probe",))
    at = (0, 499, 500, 749, 750)
    assert bare.steps == 1000 and [bare.factor(step) for step in at] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


CPU = ("--scale", "cpu")


def test_presets_for_a_cpu_keep_what_is_compared() -> None:
    arms = arms_of(layca_alpha, argv=CPU)
    assert len(arms) == 10 and {config.alpha for config in arms.values()} == {
        -0.6,
        -0.3,
        0,
        0.3,
        0.6,
    }
    assert {config.drops for config in arms.values()} == {(0.8, 0.9, 0.97)}
    assert arms["Layca, alpha 0.6"].lr == 3**-3 and arms["SGD, alpha 0"].steps == 3000
    assert list(arms_of(singh_mnist, argv=CPU)) == list(singh_mnist.PAPER)
    assert arms_of(layca_toy, argv=CPU)["Layca, layer 10"].steps == 4000 * 12  # 1280 examples
    assert arms_of(curvature_gcn, argv=CPU) == arms_of(curvature_gcn)
    names = list(arms_of(layca_adaptive, argv=CPU))
    assert len(names) == 11 and names[:3] == ["SGD", "SGD, no weight decay", "SGD + Layca"]
    with pytest.raises(ValueError, match="task c100 has no preset for a CPU"):
        arms_of(layca_alpha, argv=(*CPU, "--task", "c100"))


# --- networks ---


@pytest.mark.parametrize(
    ("network", "shape", "kernels", "parameters"),
    [
        (networks.cifar10_full, (3, 32, 32), 4, 89_578),
        (networks.vgg, (3, 32, 32), 25, 4_307_296),
        (layca_alpha.TINY, (3, 64, 64), 11, 4_715_360),
        (layca_alpha.SMALL, (3, 32, 32), 9, 74_008),
        (networks.resnet32, (3, 32, 32), 34, 464_432),
        (networks.wilson, (3, 32, 32), 15, 14_977_728),
        (partial(networks.batch_vgg, stages=networks.VGG13), (3, 32, 32), 11, 9_413_066),
        (partial(networks.batch_vgg, stages=networks.VGG13, scale=1 / 8), (3, 32, 32), 11, 148_482),
        (
            partial(networks.batch_vgg, stages=networks.VGG13[:4], scale=1 / 8, shrink=2),
            (3, 32, 32),
            9,
            74_498,
        ),
    ],
)
def test_networks_have_the_published_layers(
    network: object, shape: tuple[int, ...], kernels: int, parameters: int
) -> None:
    model = network(shape, 10)
    assert sum(p.ndim >= 2 for p in model.parameters()) == kernels
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, *shape)).shape == (2, 10)


def test_alexnet_is_caffes() -> None:
    with torch.device("meta"):
        model = networks.alexnet((3, 227, 227), 1000)
        assert model(torch.empty(1, 3, 227, 227)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == 60_965_224
    with pytest.raises(ValueError, match="3x227x227"):
        networks.alexnet((3, 32, 32), 10)


def test_within_channel_norm() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64) * 100
    squares = F.pad(x * x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2)) / 9
    torch.testing.assert_close(networks.WithinChannelNorm()(x), x * (1 + 5e-5 * squares) ** -0.75)


def test_flips_only_in_training() -> None:
    x, flip = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4).expand(64, 2, 3, 4), networks.RandomFlip()
    flipped = [row.equal(x[0].flip(-1)) for row in flip(x)]
    assert 10 < sum(flipped) < 54 and flip.eval()(x).equal(x)


def test_autoencoder_is_linear_at_its_code_and_output() -> None:
    model = networks.autoencoder(784)
    widths = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]
    assert [name for name, _ in model.named_children() if name.startswith("relu")] == [
        f"relu{i}" for i in (1, 2, 3, 5, 6, 7)
    ]
    images = Data("images", *[torch.rand(4, 1, 28, 28), torch.zeros(4).long()] * 2, 10)
    task = curvature_autoencoder.task(False, Config(), images)
    assert task.data.y.equal(images.x.flatten(1)) and task.error is None
    output, x = torch.randn(4, 784), task.data.x
    by_hand = -(x * output.sigmoid().log() + (1 - x) * (-output).sigmoid().log()).sum(1).mean()
    torch.testing.assert_close(task.loss(output, x), by_hand)


GRAPH = torch.tensor([[0, 1, 0, 2, 3, 4], [1, 0, 2, 0, 4, 3]])  # node 5 has no neighbour


def small_gcn(dropout: float) -> networks.GCN:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(6, 4, dtype=torch.float64, generator=generator)
    features[features < 0.3] = 0
    return networks.GCN(features, GRAPH, 3, hidden=5, dropout=dropout)


def test_gcn_is_the_dense_formula() -> None:
    model, nodes = small_gcn(0.0), torch.tensor([4, 0, 5])
    a = torch.eye(6, dtype=torch.float64)
    a[GRAPH[0], GRAPH[1]] = 1
    root = a.sum(1).rsqrt().diag()
    a = root @ a @ root
    x, w0, w1 = model.features.to_dense(), model.dense1.weight.T, model.dense2.weight.T
    expected = (a @ (a @ x @ w0).relu() @ w1)[nodes]
    torch.testing.assert_close(model(nodes), expected, rtol=1e-12, atol=1e-14)
    assert len(list(model.parameters())) == 2
    # Dropout is of single features and units, and off in tests.
    model = small_gcn(0.5)
    assert not model(nodes).equal(model(nodes)) and model.eval()(nodes).equal(model(nodes))


def test_gcn_has_second_derivatives() -> None:
    model, nodes = small_gcn(0.0), torch.arange(6)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(*values: torch.Tensor) -> torch.Tensor:
        changed = dict(zip(weights, values, strict=True))
        logits = torch.func.functional_call(model, changed, nodes)
        return F.cross_entropy(logits, nodes % 3)

    inputs = [p.clone().requires_grad_() for p in weights.values()]
    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs)


# --- the toy ---


def toy(layer: int, frozen: bool, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 1, 4, 4, generator=generator)
    y = torch.arange(300) % 10
    data = Data("toy", x, y, x[:20], y[:20], 10)
    return layca_toy.task(layer, frozen, 1, Config(seed=seed), data)


def test_one_layer_is_trained_on_ten_of_each_class() -> None:
    for layer in (1, 4, 10):
        task = toy(layer, False)
        assert [name for name, _ in task.model.named_parameters()] == [
            "trained.weight",
            "trained.bias",
        ]
        assert len(task.model.above) == 11 - layer
        assert task.data.y.bincount().tolist() == [10] * 10
    outputs = [toy(layer, False).model(toy(layer, False).data.test_x) for layer in (1, 4, 10)]
    for output in outputs[1:]:  # the same network, whichever layer is trained
        torch.testing.assert_close(output, outputs[0])
    assert not toy(1, False, 1).data.x.equal(toy(1, False).data.x)


def test_frozen_feedback_keeps_the_regimes_of_the_start() -> None:
    free, frozen = toy(3, False), toy(3, True)
    x = free.data.test_x
    torch.testing.assert_close(free.model(x), frozen.model(x))
    before = frozen.model(x)
    with torch.no_grad():
        frozen.model.trained.weight.mul_(-2)
        free.model.trained.weight.mul_(-2)
    # With regimes kept and no biases the output is linear in the trained weights.
    torch.testing.assert_close(frozen.model(x), -2 * before)
    assert not torch.allclose(free.model(x), -2 * before)


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


@pytest.mark.parametrize("rule", ["curvature", "backmatching", "lars"])
def test_rules_that_look_at_the_model_are_shown_it(rule: str) -> None:
    class Attached(layerlr.SGD):
        models: ClassVar[list[nn.Module]] = []

        def attach(self, model: nn.Module) -> None:
            self.models.append(model)

    def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
        return Attached(model.named_parameters(), lr=config.rate, rule="lars")

    config = Config(rule=rule, lr=0.1)
    task = replace(_images(config), optimizer=optimizer)
    training.Trainer(config, task)
    assert Attached.models == [task.model] * (rule != "lars")


# --- rates that are computed, by time ---


def timed(**arms: tuple[str, list[list[float]], float]) -> Store:
    """Rule, losses of each seed and seconds a step of each arm; a test every second step."""
    content: dict[str, object] = {"experiment": "timed", "arms": {}}
    for name, (rule, seeds, seconds) in arms.items():
        runs = {}
        for seed, losses in enumerate(seeds):
            final = {"diverged": losses[-1] is None, "test_error": 0.25, "step_ms": 1e3 * seconds}
            tests = [
                {"step": s, "seconds": s * seconds, "test_error": 0.25}
                for s in range(2, len(losses) + 1, 2)
            ]
            runs[str(seed)] = {
                "final": final | {"seconds": len(losses) * seconds},
                "records": tests,
                "losses": {"step": list(range(1, len(losses) + 1)), "loss": losses},
            }
        title = name.replace("_", ", ").replace("PLUS", " + ")
        settings = {"rule": rule, "optimizer": "momentum", "steps": 4}
        content["arms"][title] = {"settings": settings, "runs": runs}
    return Store(Path("timed.json"), content)


TIMED = timed(
    SGD_low=("none", [[8.0, 7, 6, 5], [8.0, 7, 6, 7]], 1.0),
    SGD_high=("none", [[8.0, 6, 4, 3], [8.0, 6, 4, 3]], 1.0),
    SGD_wild=("none", [[8.0, 2, 1, 1], [8.0, None]], 1.0),
    SGDPLUScurvature=("curvature", [[8.0, 4, 2, 1]], 2.0),
)


def test_train_loss_by_steps_and_in_the_time_of_sgd() -> None:
    table = by_time.table(TIMED)
    lines = [
        [c.strip() for c in r.split("|")[1:-1]] for r in runner.report.markdown(table).split("\n")
    ]
    header, low, high, wild, ruled = (lines[i] for i in (2, 4, 5, 6, 7))
    assert header[2:] == [
        *(f"step {i}" for i in (1, 2, 3, 4)),
        *("in SGD's time", "test error, %", "s a step", "of SGD's"),
    ]
    assert low[:2] == ["SGD, low", "2"] and low[5:] == [
        *("6 ± 1.4", "6 ± 1.4", "25.00 ± 0.00", "1", "1.00")
    ]
    assert high[5] == "3 ± 0"
    assert wild[0] == "SGD, wild (1 of 2 diverged)" and wild[2:6] == ["8", "2", "1", "1"]
    # Two of its steps in the four seconds that SGD takes for four.
    assert ruled == ["SGD + curvature", "1", "8", "4", "2", "1", "4", "25.00", "2", "2.00"]


def test_the_best_fixed_rate_diverges_in_no_seed() -> None:
    arms = by_time.fixed(TIMED, TIMED.arms)
    assert arms == ["SGD, low", "SGD, high", "SGD, wild"]
    assert by_time.best(TIMED, arms) == "SGD, high"
    assert by_time.best(TIMED, ["SGD, wild"]) is None


def test_times_are_those_of_the_nearest_tests() -> None:
    run = {
        "losses": {"step": [1, 2, 3, 4]},
        "records": [{"step": 2, "seconds": 6.0}, {"step": 4, "seconds": 7.0}],
    }
    assert by_time.seconds_of(run) == [3, 6, 6.5, 7]


def test_fixed_rates_are_grey_but_for_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[object] = []
    monkeypatch.setattr(runner.report, "saved", lambda figure, path: figures.append(figure) or path)
    assert by_time.plot(TIMED, tmp_path) == tmp_path
    left, middle, right = figures[0].axes
    lines = {line.get_label(): line for line in left.lines}
    assert sum(line.get_color() == by_time.GREY for line in left.lines) == 2
    assert {name for name in lines if not name.startswith("_")} == {
        *("SGD, high", "SGD + curvature", "other fixed rates")
    }
    assert lines["SGD, high"].get_ydata().tolist() == [8, 6, 4, 3]
    times = [line.get_xdata() for line in middle.lines if line.get_label() == "SGD + curvature"]
    assert list(times[0]) == [2, 4, 6, 8]
    assert [line.get_label() for line in right.lines] == ["SGD, high", "SGD + curvature"]
    # Nothing but a diverged arm, nothing bare to compare with.
    for store in (
        timed(SGD_wild=("none", [[8.0, None]], 1.0)),
        timed(SGDPLUScurvature=("curvature", [[8.0, 4]], 1.0)),
    ):
        by_time.plot(store, tmp_path)
        assert "-" in runner.report.markdown(by_time.table(store))


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


# --- claim cards ---


def finding(*differences: float, threshold: float = 0.0) -> evidence.Finding:
    values = {str(seed): value for seed, value in enumerate(differences)}
    return evidence.Finding(values, {"ours": values}, threshold)


def test_a_verdict_needs_an_interval_on_one_side() -> None:
    assert finding(1, 2, 3).half == pytest.approx(4.303 / 3**0.5)  # t of 2 degrees of freedom
    assert finding(1, 2, 3).verdict == "not resolved"
    assert finding(2, 2.1, 1.9).verdict == "confirmed"
    assert finding(-2, -2.1, -1.9).verdict == "contradicted"
    assert finding(0.5, 0.51, 0.49, threshold=0.6).verdict == "not resolved"
    assert finding(0.9, 0.91, 0.89, threshold=0.6).verdict == "confirmed"
    assert finding(-0.9, -0.91, -0.89, threshold=0.6).verdict == "contradicted"
    with pytest.raises(ValueError, match="2 to 10 seeds, given 1"):
        finding(1).half  # noqa: B018


def test_values_are_paired_by_seed() -> None:
    a, b = {"0": 1.0, "1": 5.0}, {"1": 2.0, "2": 9.0}
    assert evidence.less(a, b) == {"1": 3.0} and evidence.mean(a, b) == {"1": 3.5}
    assert evidence.best({"a": a, "b": b}) == "b" and evidence.least({"a": a, "b": b}) == "a"
    assert evidence.ranks([3, 1, 3, 7]) == [2.5, 1, 2.5, 4]
    assert evidence.rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)


def answered(errors: dict[str, float], seeds: int = 3) -> Store:
    """Arms and their test errors, a little different for each seed."""
    arms = {}
    for arm, error in errors.items():
        runs = {}
        for seed in range(seeds):
            value = error + 0.001 * seed * (1 + error)
            runs[str(seed)] = {
                "final": {"test_error": value, "diverged": False},
                "records": [{"step": s, "seconds": s, "test_error": value} for s in (600, 700)],
                "losses": {"step": [1], "loss": [value]},
                "rotation": {"names": ["a", "b"], "steps": [9], "distance": [[value, 0.0]]},
            }
        rule = "curvature" if "curvature" in arm else "none"
        alpha = float(arm.rpartition(" ")[2]) if "alpha" in arm else 0.0
        arms[arm] = {
            "settings": {"rule": rule, "alpha": alpha, "batch": 32, "steps": 9},
            "runs": runs,
        }
    return Store(Path("answered.json"), {"experiment": "answered", "network": "none", "arms": arms})


def mean_of(measure: Callable[[Store], evidence.Finding], errors: dict[str, float]) -> float:
    return measure(answered(errors)).mean


def test_claims_are_differences_of_what_they_name() -> None:
    close = partial(pytest.approx, abs=0.3)
    alphas = {"Layca, alpha -0.3": 0.3, "Layca, alpha 0": 0.2, "Layca, alpha 0.6": 0.5}
    alphas |= {"SGD, alpha -0.3": 0.25, "SGD, alpha 0": 0.4, "SGD, alpha 0.6": 0.45}
    assert mean_of(measures.uniform_is_best, alphas) == close(10)
    assert mean_of(measures.first_layers_before_last, alphas) == close(20)
    assert mean_of(measures.sgd_has_no_such_pattern, alphas) == close(15)
    assert mean_of(measures.layca_before_sgd, alphas) == close(5)
    # The rotation made up above grows with the error.
    assert mean_of(measures.rotation_goes_with_accuracy, alphas) == pytest.approx(-1)
    toy = {f"{t}, layer {n}": n / 20 for t in ("SGD", "Layca") for n in (1, 10)}
    assert mean_of(measures.shallow_before_deep, toy) == close(45)
    assert mean_of(measures.deep_before_shallow, toy) == close(-45)
    table = {"SGD": 0.2, "SGD + singh": 0.1, "NAG": 0.3, "NAG + singh": 0.1}
    assert mean_of(measures.singh, table) == mean_of(measures.singh_table, table) == close(15)
    bare = {"SGD": 0.1, "SGD, no weight decay": 0.15}
    bare |= dict(zip(measures.ADAPTIVE, (0.2, 0.3, 0.4), strict=True))
    bare |= {f"{name} + Layca": 0.1 for name in ("SGD", *measures.ADAPTIVE)}
    assert mean_of(measures.adaptive_methods_lose, bare) == close(20)
    assert mean_of(measures.layca_makes_up_for_it, bare) == close(20)
    assert mean_of(measures.sgd_needs_decay, bare) == close(5)
    curved = {"SGD, rate 1": 0.5, "SGD, rate 2": 0.4, "SGD + curvature, hessian": 0.2}
    loss = measures.train_loss("SGD", "hessian")
    assert mean_of(loss, curved) == pytest.approx(0.69, abs=0.01)
    assert mean_of(measures.generalisation("SGD", "hessian"), curved) == close(20)
    rates = {"SGD, rate 1": 0.5, "SGD, rate 2": 0.4, "SGD + probe, rate 1": 0.3}
    assert mean_of(measures.backmatching("probe"), rates) == close(10)


def test_cards_are_made_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cards.main([str(tmp_path)])
    assert "no experiment with 3 seeds" in capsys.readouterr().err
    layers = {f"{t}, layer {n}": n / 20 for t in ("SGD", "Layca") for n in (1, 10)}
    for name, seeds in (("layca_toy_cpu", 3), ("layca_toy_frozen_cpu", 3), ("singh_mnist", 2)):
        content = answered(layers, seeds).content
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = cards.main([str(tmp_path)])
    assert [card.finding.verdict for card in found] == ["confirmed", "contradicted"]
    text = (tmp_path / "cards.md").read_text()
    assert "| **contradicted** |" in text and "![layca_toy_cpu](layca_toy_cpu.png)" in text
    assert "- consistently better than SGD" in text.partition("## Without a card")[2]
    assert (tmp_path / "cards.png").read_bytes().startswith(b"\x89PNG")
    # An arm that lacks a seed keeps the card back.
    content["arms"]["SGD, layer 1"]["runs"].popitem()
    assert not Store(Path(), content).complete(1)
