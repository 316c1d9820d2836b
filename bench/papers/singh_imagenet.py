"""Singh et al. 2015, figure 2: Caffe's AlexNet on ImageNet, SGD with and without singh.

350,000 iterations, the rate divided by 10 every ``--step-down 100000``; singh starts at 0.006, SGD
at 0.01. Wants FOLDER/train/<class>/ and FOLDER/val/<class>/ with image files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .networks import alexnet
from .runner import Arm, Budget, Experiment, Scope, main, network
from .store import Store

ITERATIONS = 350_000
NOTES = (
    "Biases have their weights' rate and decay (Caffe: twice the rate, no decay). The mean colour "
    "is subtracted (Caffe: the mean image). No augmentation, as in the paper."
)


def arms(scope: Scope) -> list[Arm]:
    every = scope.options.step_down
    common = {
        "optimizer": "momentum",
        "weight_decay": 5e-4,
        "layers": "module",
        "drops": tuple(at / ITERATIONS for at in range(every, ITERATIONS, every)),
        "drop_factor": 0.1,
    }
    task = network(alexnet)
    return [
        Arm("SGD", scope.config(lr=0.01, **common), task),
        Arm("SGD + singh", scope.config(lr=0.006, rule="singh", **common), task),
    ]


def experiment(options: argparse.Namespace) -> Experiment:
    return Experiment(
        name="singh_imagenet",
        data="imagenet",
        network="Caffe's AlexNet: bench.papers.networks.alexnet",
        full=Budget(seeds=1, batch=256, iterations=ITERATIONS),
        quick=Budget(seeds=1, batch=16, iterations=20, items=200),
        arms=arms,
        notes=NOTES,
        evals=70,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step-down", type=int, default=100_000, help="iterations between drops, of 350,000"
    )


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
