"""Singh et al. 2015, table II: Caffe's cifar10_full, each optimizer with and without singh.

70,000 iterations, the rate divided by 10 at 60,000 and at 65,000; ``--step-down 50000`` does that
10,000 iterations earlier and trains 60,000, as the paper also did.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from bench.config import Config, build_optimizer

from .networks import cifar10_full
from .runner import Arm, Budget, Experiment, Scope, main, network
from .singh_mnist import DIRECTIONS
from .store import Store

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
    at = scope.options.step_down
    task = network(cifar10_full, optimizer=optimizer)
    found = []
    for title, direction in DIRECTIONS.items():
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
            found.append(Arm(title if rule == "none" else f"{title} + singh", config, task))
    return found


def experiment(options: argparse.Namespace) -> Experiment:
    at = options.step_down
    return Experiment(
        name="singh_cifar10" + ("" if at == 60_000 else f"_{at}"),
        data="cifar10",
        scaling="centred",
        network="Caffe's cifar10_full: bench.papers.networks.cifar10_full",
        full=Budget(seeds=5, batch=100, iterations=at + 10_000),
        quick=Budget(seeds=1, batch=100, iterations=70, items=1000),
        arms=arms,
        notes=NOTES,
        evals=35,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "iteration of the first drop; the second is 5,000 later, the end 10,000"
    parser.add_argument("--step-down", type=int, default=60_000, help=text)


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
