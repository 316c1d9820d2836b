"""Carbonnelle and De Vleeschouwer 2018, figure 1: which one layer would you train?

An MLP of ten equal hidden layers learns 10 digits a class by one of its hidden layers alone, with
SGD (rate 10, full batch, 4,000 epochs) or with Layca (3^-3). The paper finds SGD's test accuracy
to fall with the depth of that layer. ``--frozen-feedback`` keeps every ReLU in the regime that the
initial network gave it for the same image, so that a layer cannot improve the feedback it gets;
the paper then finds the opposite trend. ``--scale cpu``: images of 14x14, hidden layers of 196,
four of the ten.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from bench.config import Config
from bench.data import Data
from bench.trainer import Task

from . import report
from .runner import Arm, Budget, Experiment, Scope, main
from .store import Store

HIDDEN, PER_CLASS = 10, 10
CPU_LAYERS = (1, 4, 7, 10)
RATES = {"SGD": 10.0, "Layca": 3.0**-3}


class Frozen(nn.Module):
    """A dense layer whose weights are no parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().clone())
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class OneTrained(nn.Module):
    """The trained layer and the frozen ones above it; what lies below never changes."""

    def __init__(self, layers: Sequence[nn.Linear], frozen_feedback: bool) -> None:
        super().__init__()
        self.trained = layers[0]
        self.above = nn.ModuleList(Frozen(layer) for layer in layers[1:])
        self.start = Frozen(layers[0]) if frozen_feedback else None

    def forward(self, x: Tensor) -> Tensor:
        if self.start is None:
            h = F.relu(self.trained(x))
            for layer in self.above[:-1]:
                h = F.relu(layer(h))
            return self.above[-1](h)
        with torch.no_grad():
            regimes, h = [], x
            for layer in (self.start, *self.above[:-1]):
                h = F.relu(layer(h))
                regimes.append(h > 0)
        h = x
        for layer, regime in zip((self.trained, *self.above[:-1]), regimes, strict=True):
            h = layer(h) * regime
        return self.above[-1](h)


def task(layer: int, frozen_feedback: bool, shrink: int, config: Config, data: Data) -> Task:
    """Train hidden layer `layer` (1 to 10) on `PER_CLASS` examples of each class.

    Images, and with them the hidden layers, are `shrink` times smaller in height and width.
    """
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(data.y), generator=generator).to(data.y.device)
    labels = data.y[order]
    chosen = torch.cat([order[labels == label][:PER_CLASS] for label in range(data.classes)])
    x, test_x = (F.avg_pool2d(part, shrink).flatten(1) for part in (data.x[chosen], data.test_x))
    width = x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        layers = [nn.Linear(width, width) for _ in range(HIDDEN)]
        layers.append(nn.Linear(width, data.classes))
        for dense in layers:  # as Keras draws them
            nn.init.xavier_uniform_(dense.weight)
            nn.init.zeros_(dense.bias)
    with torch.no_grad():
        for dense in layers[: layer - 1]:
            dense.to(x.device)
            x, test_x = F.relu(dense(x)), F.relu(dense(test_x))
    reached = replace(data, x=x, y=data.y[chosen], test_x=test_x)
    return Task(reached, OneTrained(layers[layer - 1 :], frozen_feedback))


def arms(scope: Scope) -> list[Arm]:
    found = []
    for title, rate in RATES.items():
        config = scope.config(
            optimizer="sgd",
            rule="none" if title == "SGD" else "layca",
            rule_options=() if title == "SGD" else ("others=freeze",),
            lr=rate,
            schedule="constant",
        )
        for layer in scope.options.layers:
            shrink = 2 if scope.options.scale == "cpu" else 1
            trained = partial(task, layer, scope.options.frozen_feedback, shrink)
            found.append(Arm(f"{title}, layer {layer}", config, trained))
    return found


def _layers(store: Store, title: str) -> dict[int, str]:
    """Trained layer -> arm."""
    names = [arm for arm in store.arms if arm.startswith(f"{title}, ")]
    return dict(sorted((int(arm.rpartition(" ")[2]), arm) for arm in names))


def table(store: Store) -> Table:
    """Test accuracy by trained layer."""
    by_title = {title: _layers(store, title) for title in RATES}
    rows = []
    for layer in sorted(set().union(*by_title.values())):
        cells = []
        for layers in by_title.values():
            arm = layers.get(layer)
            runs = store.runs(arm) if arm else []
            cells.append(report.mean_std([100 - error for error in store.last(arm)] if arm else []))
            losses = [run["final"]["train_loss"] for run in runs]
            known = [loss for loss in losses if loss is not None]
            cells.append(f"{statistics.mean(known):.2g}" if known else "-")
        rows.append([str(layer), *cells])
    header = [f"{title}: {what}" for title in RATES for what in ("test accuracy, %", "train loss")]
    return report.table_of(["trained layer", *header], rows, store.content["title"])


def plot(store: Store, path: Path) -> Path:
    """Accuracy by trained layer; how far each trained layer turned (first seed)."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    first, *others = figure.subplots(1, 3)
    for title, colour in zip(RATES, ("#444444", "#0072B2"), strict=True):
        layers = _layers(store, title)
        values = [[100 - error for error in store.last(arm)] for arm in layers.values()]
        means = [statistics.mean(v) for v in values]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        first.errorbar(list(layers), means, spreads, fmt="o-", color=colour, label=title, capsize=3)
    first.set(xlabel="trained layer", ylabel="test accuracy, %")
    first.grid(**report.GRID)
    first.legend(frameon=False)
    for axes, title in zip(others, RATES, strict=True):
        for layer, arm in _layers(store, title).items():
            curve = store.runs(arm)[0]["rotation"]
            distance = [row[0] for row in curve["distance"]]
            colour = colormaps["viridis"]((layer - 1) / (HIDDEN - 1))
            axes.plot(curve["steps"], distance, color=colour, label=f"layer {layer}")
        axes.set(xlabel="epoch", ylabel="cosine distance from the start", title=title, ylim=(0, 1))
        axes.grid(**report.GRID)
        axes.legend(frameon=False, fontsize="x-small", ncols=2)
    return report.saved(figure, path)


def experiment(options: argparse.Namespace) -> Experiment:
    cpu = options.scale == "cpu"
    if options.layers is None:
        options.layers = CPU_LAYERS if cpu else range(1, HIDDEN + 1)
    if not all(1 <= layer <= HIDDEN for layer in options.layers):
        raise ValueError(f"--layers are numbers from 1 to {HIDDEN}")
    frozen = options.frozen_feedback
    return Experiment(
        name="layca_toy" + "_frozen" * frozen,
        data="mnist",
        network=f"MLP, ten hidden layers of {196 if cpu else 784}, ReLU, one of them trained",
        full=Budget(seeds=10, batch=10 * PER_CLASS, epochs=4000),
        cpu=Budget(seeds=3, batch=10 * PER_CLASS, epochs=4000),
        quick=Budget(seeds=1, batch=10 * PER_CLASS, epochs=60),
        arms=arms,
        table=table,
        plot=plot,
        examples=10 * PER_CLASS,
        evals=1,
        records=25 if cpu else 50,
        more={"title": "feedback " + ("frozen" if frozen else "free")},
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", help="which are trained; default: all")
    text = "keep each ReLU's regime as the initial network had it"
    parser.add_argument("--frozen-feedback", action="store_true", help=text)


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
