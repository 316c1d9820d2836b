"""How long is the step that lowers the loss most? Along the steps of fixed rates, it is measured.

``rule="curvature"`` steps to the minimum of the loss along the optimizer's step. Here SGD and AdamW
train at their best fixed rate and at a tenth of it, and at every test the mean train loss is taken
at five places along the last step, whose parabola says where it would have been least: 1 is where
the step ended, below 1 it went too far for that one step. The network is `curvature_cnn`'s for a
CPU, or with ``--autoencoder`` that of `curvature_autoencoder`; batches of 64 either way.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from bench.data import Data
from bench.record import Result
from bench.train import settings
from bench.trainer import TEST_BATCH, Trainer

from . import by_time, curvature_autoencoder, curvature_cnn, report
from .networks import batch_vgg
from .runner import AfterStep, Arm, Budget, Experiment, Job, Scope, main, network
from .store import Store

PLACES = (0.0, 0.5, 1.0, 1.5, 2.0)  # along a step
IMAGES = 5000  # whose mean loss is looked at
CNN = (("SGD", (0.003, 0.03)), ("AdamW", (0.0003, 0.003)))
AUTOENCODER = (("SGD", (0.0003, 0.003)),)


def train(job: Job, data: Data, after_step: AfterStep) -> list[Result]:
    """As anywhere; the record of each test says where its last step had its ``minimum``."""
    results = []
    for arm, config in job:
        with settings(config):
            trainer = Trainer(config, arm.task(config, data))
            while trainer.step < config.steps and not trainer.diverged:
                test = min(trainer.step + config.eval_every, config.steps)
                trainer.run(test - 1, after_step)
                start = [p.detach().clone() for p in trainer.model.parameters()]
                trainer.run(test, after_step)
                trainer.records[-1]["minimum"] = minimum(trainer, start)
            results.append(trainer.result())
    return results


@torch.no_grad()
def minimum(trainer: Trainer, start: Sequence[Tensor]) -> float:
    """Where the train loss is least between `start`, 0, and the weights, 1; NaN: nowhere."""
    model, losses = copy.deepcopy(trainer.model), []
    x, y = trainer.data.x[:IMAGES].split(TEST_BATCH), trainer.data.y[:IMAGES].split(TEST_BATCH)
    for place in PLACES:
        pairs = zip(model.parameters(), start, trainer.model.parameters(), strict=True)
        for p, begin, end in pairs:
            p.copy_(begin.lerp(end, place))
        parts = [trainer.task.loss(model(xs), ys) for xs, ys in zip(x, y, strict=True)]
        losses.append(torch.stack(parts).mean().item())
    bend, slope, _ = np.polyfit(PLACES, losses, 2)
    return float(-slope / (2 * bend)) if bend > 0 else math.nan


def minima(run: dict[str, Any]) -> list[float]:
    """Of the tests of a run's second half, where there is one."""
    records = run["records"]
    found = [record["minimum"] for record in records[len(records) // 2 :]]
    return [x for x in found if x is not None]


def second_half(run: dict[str, Any]) -> float:
    """Their median."""
    return statistics.median(minima(run))


def arms(scope: Scope) -> list[Arm]:
    if scope.options.autoencoder:
        module, rates = curvature_autoencoder, AUTOENCODER
        task = partial(curvature_autoencoder.task, True)
    else:
        module, rates = curvature_cnn, CNN
        task = network(partial(batch_vgg, stages=curvature_cnn.STAGES, scale=1 / 4, shrink=2))
    directions = {direction.title: direction for direction in module.DIRECTIONS}
    chosen = [replace(directions[title], rates=both) for title, both in rates]
    return by_time.arms(scope, task, chosen, {})


def table(store: Store) -> Table:
    """A line an arm: the minimum, and the loss that training ends at."""
    rows = []
    for arm in store.arms:
        runs = store.runs(arm)
        losses = [run["losses"]["loss"][-1] for run in runs]
        minima = [second_half(run) for run in runs]
        rows.append([arm, str(len(runs)), report.mean_std(minima), report.mean_std(losses, 3)])
    header = ["", "seeds", "minimum, second half", "train loss at the end"]
    return report.table_of(header, rows, "where the loss is least along a step, in steps")


def plot(store: Store, path: Path) -> Path:
    """The minima of the second half of all seeds' runs; the train loss."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    along, losses = figure.subplots(1, 2)
    for at, arm in enumerate(store.arms):
        runs, colour = store.runs(arm), report.COLOURS[at]
        every = [x for run in runs for x in minima(run)]
        along.boxplot(every, positions=[at], widths=0.5, showfliers=False, medianprops={"lw": 2})
        along.plot([at] * len(runs), [second_half(run) for run in runs], "o", color=colour)
        for run in runs:
            curve, label = run["losses"], arm if run is runs[0] else None
            losses.plot(curve["step"], curve["loss"], color=colour, linewidth=0.9, label=label)
    along.axhline(1, color="#444444", linewidth=0.8)
    along.axhline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    along.set_xticks(range(len(store.arms)), [arm.replace(", ", "\n") for arm in store.arms])
    along.set_ylabel("minimum along a step (1: its end)")
    losses.set(xlabel="step", ylabel="train loss", yscale="log")
    losses.legend(frameon=False, fontsize="small")
    for axes in (along, losses):
        axes.grid(**report.GRID)
    return report.saved(figure, path)


def experiment(options: argparse.Namespace) -> Experiment:
    budget = Budget(seeds=3, batch=64, iterations=1500, items=5000)
    quick = Budget(seeds=1, batch=32, iterations=20, items=64)
    network = "196-250-125-62-30 and back: bench.papers.networks.autoencoder"
    if not options.autoencoder:
        network = curvature_cnn.experiment(argparse.Namespace(scale="cpu", width=1.0)).network
    return Experiment(
        name="curvature_line" + ("_autoencoder" if options.autoencoder else ""),
        data="mnist" if options.autoencoder else "cifar10",
        scaling="unit" if options.autoencoder else "standard",
        network=network,
        full=budget,
        cpu=budget,
        quick=quick,
        arms=arms,
        table=table,
        plot=plot,
        train=train,
        evals=20,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--autoencoder", action="store_true", help="MNIST instead of CIFAR-10")


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
