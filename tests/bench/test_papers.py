"""The papers' experiments: networks and settings as published."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from functools import partial
from typing import ClassVar

import bench_packages  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layerlr
from bench import train as training
from bench.config import Config
from bench.data import Data
from bench.models import build
from bench.papers import (
    backmatching_vgg,
    curvature_autoencoder,
    curvature_cnn,
    curvature_gcn,
    layca_adaptive,
    layca_alpha,
    layca_toy,
    networks,
    runner,
    singh_cifar10,
    singh_imagenet,
    singh_mnist,
)
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
    options.quick, options.batch = False, None
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
    options = argparse.Namespace(width=1, scale="paper", batch=None)
    assert module.experiment(options).full.seeds == seeds
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
