"""Bahamou and Goldfarb 2023: step sizes from curvature, on a graph convolutional network.

Kipf and Welling's two layers learn Cora from 140 labelled nodes, the whole graph in each of 200
steps. The paper (of which we know the abstract) finds steps from each layer's own curvature to
spare the search for a rate, with SGD-momentum and with AdamW. Fixed rates of a grid against
``rule="curvature"`` at its defaults, by iterations and by time; with Kipf and Welling's Adam too,
whose own rate is 0.01.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from bench.config import Config, build_optimizer
from bench.data import Data, GraphData
from bench.trainer import Task

from . import by_time
from .networks import GCN
from .runner import Arm, Budget, Experiment, Scope, main
from .store import Store

DECAY = {"weight_decay": 5e-4}
DIRECTIONS = (
    by_time.Direction("SGD", "momentum", (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), DECAY),
    by_time.Direction("AdamW", "adamw", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), DECAY),
    by_time.Direction("Adam", "adam", (3e-3, 1e-2, 3e-2), DECAY),
)
# "fisher" wants rows of a layer to be samples of the loss; here they are nodes of the graph.
CURVATURES = {"hessian": ()}
NOTES = (
    "As Kipf and Welling have it: dropout 0.5, L2 of 5e-4 on the first layer alone (in AdamW "
    "decoupled, hence next to nothing), no biases, weights as Glorot has them (uniform); but no "
    "early stopping: the test is of the last step. Rates are constant; the grids are ours."
)


def task(config: Config, data: Data) -> Task:
    """The inputs are numbers of nodes; the network holds the graph."""
    assert isinstance(data, GraphData)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Task(data, GCN(data.features, data.edges, data.classes), optimizer=optimizer)


def optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The second layer does not decay."""
    layers = dict(model.named_children())
    made = build_optimizer(config, nn.ModuleDict({"dense1": layers["dense1"]}))
    second = [(f"dense2.{name}", p) for name, p in layers["dense2"].named_parameters()]
    made.add_param_group({"params": second, "weight_decay": 0.0})
    return made


def arms(scope: Scope) -> list[Arm]:
    return by_time.arms(scope, task, DIRECTIONS, CURVATURES)


def experiment(options: argparse.Namespace) -> Experiment:
    return Experiment(
        name="curvature_gcn",
        data="cora",
        network="GCN, 16 hidden units: bench.papers.networks.GCN",
        full=Budget(seeds=10, batch=140, epochs=200),
        cpu=Budget(seeds=10, batch=140, epochs=200),
        quick=Budget(seeds=1, batch=140, epochs=60),
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
