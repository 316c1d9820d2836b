"""Carbonnelle and De Vleeschouwer 2018, figures 4 and 5: adaptive methods with and without Layca.

The network of Wilson et al. (2017) on CIFAR-10, flips and dropout, 250 epochs. The paper finds
adaptive methods to generalise worse than SGD, and the difference to vanish under Layca; and SGD to
lose accuracy, its layers to turn less evenly, without weight decay. ``--scale cpu``: the network
of `layca_alpha`, bare rates searched, weight decay left out of SGD alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from bench.config import LAYCA_RATE, LAYCA_RATE_AVERAGED

from .layca_alpha import SMALL, WORDS
from .networks import wilson
from .runner import Arm, Budget, Experiment, Scope, Search, main, network
from .store import Store

# title: direction, the paper's rate without Layca, keyword arguments as in Keras
DIRECTIONS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "SGD": ("sgd", 0.5, ()),
    "AMomSGD": ("amom", 0.5, ()),
    "RMSprop": ("rmsprop", 3e-4, ("alpha=0.9", "eps=1e-7")),
    "Adagrad": ("adagrad", 0.01, ("eps=1e-7",)),
    "Adam": ("adam", 3e-4, ("eps=1e-7",)),
}
# Four rates a bare method, a factor of 4 apart.
CPU_RATES = {
    "SGD": (0.04, 0.16, 0.64, 2.56),
    "AMomSGD": (0.04, 0.16, 0.64, 2.56),
    "RMSprop": (2.5e-4, 1e-3, 4e-3, 1.6e-2),
    "Adagrad": (2.5e-3, 1e-2, 4e-2, 0.16),
    "Adam": (2.5e-4, 1e-3, 4e-3, 1.6e-2),
}
BARE_DROPS = tuple(epoch / 250 for epoch in range(25, 250, 25))
LAYCA_DROPS = (100 / 250, 170 / 250, 220 / 250)


def arms(scope: Scope) -> list[Arm]:
    cpu = scope.options.scale == "cpu"
    task = network(SMALL if cpu else partial(wilson, dropout=not scope.options.no_dropout))
    found = []
    for title, (direction, rate, options) in DIRECTIONS.items():
        for decay, suffix in ((5e-4, ""), (0.0, ", no weight decay")):
            if cpu and suffix and title != "SGD":
                continue
            bare = scope.config(
                optimizer=direction,
                options=options,
                lr=rate,
                weight_decay=decay,
                drops=BARE_DROPS,
                drop_factor=0.5,
            )
            search = Search(title + suffix, bare, CPU_RATES[title]) if cpu else None
            found.append(Arm(title + suffix, bare, task, search))
        averaged = direction in ("amom", "adam")
        layca = scope.config(
            optimizer=direction,
            options=options,
            rule="layca",
            lr=LAYCA_RATE_AVERAGED if averaged else LAYCA_RATE,
            weight_decay=0.0,
            drops=LAYCA_DROPS,
            drop_factor=0.2,
        )
        found.append(Arm(f"{title} + Layca", layca, task))
    return found


def experiment(options: argparse.Namespace) -> Experiment:
    cpu = options.scale == "cpu"
    return Experiment(
        name="layca_adaptive" + "_no_dropout" * options.no_dropout,
        data="cifar10",
        network=WORDS if cpu else "C10-CNN2 (Wilson et al. 2017): bench.papers.networks.wilson",
        full=Budget(seeds=1, batch=128, epochs=250),
        cpu=Budget(seeds=3, batch=32, iterations=2000, items=5000),
        quick=Budget(seeds=1, batch=32, iterations=6, items=128),
        arms=arms,
        evals=4 if cpu else 50,
        records=25 if cpu else 50,
        notes="Weight decay is L2, 5e-4 w added to the gradient.",
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-dropout", action="store_true", help="leave dropout out")


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
