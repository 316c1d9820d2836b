"""Bahamou and Goldfarb 2023: step sizes from curvature, on a deep autoencoder of MNIST.

784-1000-500-250-30 and back, ReLU, code and output linear, batches of 1,000. The paper (of which
we know the abstract) finds steps from each layer's own curvature to spare the search for a rate,
with SGD-momentum and with AdamW, at about the cost of one more gradient. Fixed rates of a grid
against ``rule="curvature"`` at its defaults, by iterations and by time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

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


def task(config: Config, data: Data) -> Task:
    """Each image is its own target."""
    x, test_x = data.x.flatten(1), data.test_x.flatten(1)
    images = replace(data, x=x, y=x, test_x=test_x, test_y=test_x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Task(images, autoencoder(x.shape[1]), loss, error=None)


def arms(scope: Scope) -> list[Arm]:
    return by_time.arms(scope, task, DIRECTIONS, CURVATURES)


def experiment(options: argparse.Namespace) -> Experiment:
    return Experiment(
        name="curvature_autoencoder",
        data="mnist",
        scaling="unit",
        network="784-1000-500-250-30-250-500-1000-784: bench.papers.networks.autoencoder",
        full=Budget(seeds=3, batch=1000, iterations=2000),
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
