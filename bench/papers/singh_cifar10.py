"""Singh et al. 2015, table II: Caffe's cifar10_full, each optimizer with and without singh.

70,000 iterations, the rate divided by 10 at 60,000 and at 65,000; ``--step-down 50000`` does that
10,000 iterations earlier and trains 60,000, as the paper also did. ``--scale cpu``: a twentieth of
either schedule on images of 16x16, SGD and AdaGrad, each arm at the best of five rates of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from bench.config import Config, build_optimizer

from .networks import cifar10_full
from .runner import Arm, Budget, Experiment, Scope, Search, main, network
from .singh_mnist import DIRECTIONS
from .store import Store

CPU_RATES = (0.00025, 0.0005, 0.001, 0.002, 0.004)
NOTES = (
    "Biases have their weights' rate (Caffe: twice it); ip1's bias decays with its weight (Caffe: "
    "not at all). Pooling as in Caffe, max then mean (the paper's text: max)."
)


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """ip1 decays 250 times as fast as the convolutions."""
    rest = {name: child for name, child in model.named_children() if name != "ip1"}
    made = build_optimizer(config, nn.ModuleDict(rest))
    ip1 = [(f"ip1.{name}", p) for name, p in model.get_submodule("ip1").named_parameters()]
    made.add_param_group({"params": ip1, "weight_decay": 250 * (config.weight_decay or 0.0)})
    return made


def arms(scope: Scope) -> list[Arm]:
    at, cpu = scope.options.step_down, scope.options.scale == "cpu"
    build = partial(cifar10_full, shrink=2) if cpu else cifar10_full
    task = network(build, optimizer=optimizer)
    found = []
    for title, direction in DIRECTIONS.items():
        if cpu and title == "NAG":
            continue
        for rule in ("none", "singh"):
            config = scope.config(
                optimizer=direction,
                rule=rule,
                layers="module",
                lr=0.001,
                weight_decay=0.004,
                drops=(at / (at + 10_000), (at + 5_000) / (at + 10_000)),
                drop_factor=0.1,
                options=("eps=1e-8",) if direction == "adagrad" else (),
            )
            name = title if rule == "none" else f"{title} + singh"
            search = Search(name, config, CPU_RATES) if cpu else None
            found.append(Arm(name, config, task, search))
    return found


def experiment(options: argparse.Namespace) -> Experiment:
    at, cpu = options.step_down, options.scale == "cpu"
    size = ", images of 16x16" if cpu else ""
    return Experiment(
        name="singh_cifar10" + ("" if at == 60_000 else f"_{at}"),
        data="cifar10",
        scaling="centred",
        network=f"Caffe's cifar10_full{size}: bench.papers.networks.cifar10_full",
        full=Budget(seeds=5, batch=100, iterations=at + 10_000),
        cpu=Budget(seeds=3, batch=32, iterations=(at + 10_000) // 20, items=10_000),
        quick=Budget(seeds=1, batch=100, iterations=70, items=1000),
        arms=arms,
        notes=NOTES,
        evals=7 if cpu else 35,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "iteration of the first drop; the second is 5,000 later, the end 10,000"
    parser.add_argument("--step-down", type=int, default=60_000, help=text)


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
