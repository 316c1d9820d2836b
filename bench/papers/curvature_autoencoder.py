"""Bahamou and Goldfarb 2023: step sizes from curvature, on a deep autoencoder of MNIST.

784-1000-500-250-30 and back, ReLU, code and output linear, batches of 1,000. The paper (of which
we know the abstract) finds steps from each layer's own curvature to spare the search for a rate,
with SGD-momentum and with AdamW, at about the cost of one more gradient. Fixed rates of a grid
against ``rule="curvature"`` at its defaults, by iterations and by time. ``--scale cpu``: images
of 14x14, 196-250-125-62-30 and back, batches of 500; ``--batch 64`` has results of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.config import Config
from bench.data import Data
from bench.trainer import Task

from . import by_time
from .networks import autoencoder
from .runner import Arm, Budget, Experiment, Scope, main
from .store import Store

# Seven a factor of 3 apart about the best, three for AdamW: by probes of 40 steps.
DIRECTIONS = (
    by_time.Direction(
        "SGD",
        "momentum",
        (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        {"weight_decay": 1e-5},
    ),
    by_time.Direction("AdamW", "adamw", (3e-4, 1e-3, 3e-3), {"weight_decay": 1e-5}),
)
FISHER = ("curvature=fisher", "likelihood=bernoulli", "reduction=batchmean")
CURVATURES = {
    "hessian": (),
    "hessian every 4 steps": ("refresh=4",),
    "fisher": FISHER,
    "fisher every 4 steps": (*FISHER, "refresh=4"),
}
NOTES = (
    "Budget, rates and the decay of AdamW (1e-5, decoupled) are ours, the rest as the authors' "
    "group has it for this network: sigmoid cross-entropy, summed over pixels, mean over the "
    "batch; L2 of 1e-5/2 |w|^2. Weights are drawn as He has it (normal), biases from 0. Rates "
    "are constant."
)


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Sigmoid cross-entropy: summed over pixels, mean over the batch."""
    return F.binary_cross_entropy_with_logits(output, y, reduction="sum") / len(y)


def task(small: bool, config: Config, data: Data) -> Task:
    """Each image is its own target; a small network sees it at half its height and width."""
    x, test_x = (F.avg_pool2d(part, 2 if small else 1).flatten(1) for part in (data.x, data.test_x))
    images = replace(data, x=x, y=x, test_x=test_x, test_y=test_x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        hidden = (250, 125, 62) if small else (1000, 500, 250)
        return Task(images, autoencoder(x.shape[1], hidden), loss, error=None)


def arms(scope: Scope) -> list[Arm]:
    small = scope.options.scale == "cpu"
    return by_time.arms(scope, partial(task, small), DIRECTIONS, CURVATURES)


def experiment(options: argparse.Namespace) -> Experiment:
    widths = "196-250-125-62" if options.scale == "cpu" else "784-1000-500-250"
    back = "-".join(reversed(widths.split("-")))
    return Experiment(
        name="curvature_autoencoder" + (f"_batch{options.batch}" if options.batch else ""),
        data="mnist",
        scaling="unit",
        network=f"{widths}-30-{back}: bench.papers.networks.autoencoder",
        full=Budget(seeds=3, batch=1000, iterations=2000),
        cpu=Budget(seeds=3, batch=500, iterations=600),
        quick=Budget(seeds=1, batch=250, iterations=20, items=1000),
        arms=arms,
        notes=NOTES,
        table=by_time.table,
        plot=by_time.plot,
        evals=20,
    )


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv)


if __name__ == "__main__":
    run()
