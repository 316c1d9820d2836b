"""Bahamou and Goldfarb 2023: step sizes from curvature, on a convolutional network.

Six convolutions with batch normalisation learn CIFAR-10. The paper (of which we know the abstract)
finds steps from each layer's own curvature to spare the search for a rate, with SGD-momentum and
with AdamW. Fixed rates of a grid, among them torch's untuned 0.001, against ``rule="curvature"``
at its defaults, by iterations and by time. ``--width 0.5`` halves the channels; ``--scale cpu``
takes a quarter of them and images at half their height and width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from . import by_time
from .networks import batch_vgg
from .runner import Arm, Budget, Experiment, Scope, main, network
from .store import Store

STAGES = ((2, 32), (2, 64), (2, 128))
DIRECTIONS = (
    by_time.Direction("SGD", "momentum", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), {"weight_decay": 5e-4}),
    by_time.Direction("AdamW", "adamw", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), {"weight_decay": 0.01}),
)
CURVATURES = {
    "hessian": (),
    "hessian every 4 steps": ("refresh=4",),
    "fisher": ("curvature=fisher",),
}
NOTES = (
    "Network, budget, rates and decays (SGD: L2 of 5e-4; AdamW: 0.01, decoupled) are ours. No "
    "augmentation; weights are drawn as He has it (normal). Rates are constant."
)


def arms(scope: Scope) -> list[Arm]:
    task = network(partial(batch_vgg, stages=STAGES, scale=scope.options.width))
    if scope.options.scale == "cpu":
        task = network(partial(batch_vgg, stages=STAGES, scale=1 / 4, shrink=2))
    return by_time.arms(scope, task, DIRECTIONS, CURVATURES)


def experiment(options: argparse.Namespace) -> Experiment:
    width = 1 / 4 if options.scale == "cpu" else options.width
    return Experiment(
        name="curvature_cnn" + ("" if options.width == 1 else f"_{options.width:g}"),
        data="cifar10",
        network=f"two convolutions each of 32, 64, 128 channels times {width:g}, batch norm, "
        "max-pooling, dense: bench.papers.networks.batch_vgg",
        full=Budget(seeds=3, batch=128, epochs=20),
        cpu=Budget(seeds=3, batch=64, iterations=1500, items=5000),
        quick=Budget(seeds=1, batch=32, iterations=20, items=64),
        arms=arms,
        notes=NOTES,
        table=by_time.table,
        plot=by_time.plot,
        evals=20,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=float, default=1.0, help="factor on every width")


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
