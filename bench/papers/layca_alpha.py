"""Carbonnelle and De Vleeschouwer 2018, figures 2 and 3: rates by depth, under SGD and Layca.

Layer l of L has the rate (1-alpha)^(5(L-1-l)/(L-1)) for alpha > 0, (1+alpha)^(5l/(L-1)) for
alpha < 0. The paper finds alpha = 0 to be best under Layca, negative ones better than positive
ones, and test accuracy to follow how far the layers have turned. ``--task c10``: C10-CNN1 on
CIFAR-10; ``c100``: ResNet-32 on CIFAR-100; ``tiny``: an 11-layer CNN on Tiny ImageNet.
``--scale cpu``: C10-CNN1 with a third of the layers at a quarter of their width, SGD's rate
searched at alpha 0.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from . import report
from .networks import resnet32, vgg
from .runner import Arm, Budget, Experiment, Scope, Search, main, network
from .store import Store

ALPHAS = (-0.8, -0.6, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
LAYCA_RATE = 3.0**-3
COLOURS = {"SGD": "#444444", "Layca": "#0072B2"}


@dataclass(frozen=True)
class Setting:
    data: str
    network: Callable[[tuple[int, ...], int], nn.Module]
    words: str
    sgd_rate: float
    epochs: int
    drops: tuple[float, ...]


TINY = partial(vgg, widths=(32, 64, 128, 256, 512), depth=2, norm_momentum=0.1)
TASKS = {
    "c10": Setting("cifar10", vgg, "C10-CNN1, 25 kernels", 1.0, 100, (0.8, 0.9, 0.97)),
    "c100": Setting(
        "cifar100",
        resnet32,
        "ResNet-32, 34 kernels",
        1 / 3,
        120,
        (70 / 120, 0.75, 0.875, 115 / 120),
    ),
    "tiny": Setting("tiny_imagenet", TINY, "tiny-CNN, 11 kernels", 1 / 3, 80, (0.875,)),
}

SMALL = partial(vgg, widths=(8, 16, 32, 64), depth=2, norm_momentum=0.1, shrink=2)
WORDS = "C10-CNN1's layout on images of 16x16: 9 kernels, 8 to 64 channels"
CPU_ALPHAS = (-0.6, -0.3, 0.0, 0.3, 0.6)
CPU_RATES = (3.0**-3, 3.0**-2, 3.0**-1, 1.0, 3.0)  # for SGD at alpha 0


def _setting(options: argparse.Namespace) -> Setting:
    setting = TASKS[options.task]
    if options.scale == "paper":
        return setting
    if options.task != "c10":
        raise ValueError(f"task {options.task} has no preset for a CPU: leave --scale away")
    return replace(setting, network=SMALL, words=WORDS)


def arms(scope: Scope) -> list[Arm]:
    setting = _setting(scope.options)
    found = []
    for title in COLOURS:
        for alpha in scope.options.alphas:
            config = scope.config(
                optimizer="sgd",
                rule="none" if title == "SGD" else "layca",
                lr=setting.sgd_rate if title == "SGD" else LAYCA_RATE,
                alpha=alpha,
                drops=setting.drops,
                drop_factor=0.2,
            )
            search = None
            if scope.options.scale == "cpu" and title == "SGD":
                search = Search("SGD, alpha 0", replace(config, alpha=0.0), CPU_RATES)
            found.append(Arm(_name(title, alpha), config, network(setting.network), search))
    return found


def _name(title: str, alpha: float) -> str:
    return f"{title}, alpha {alpha:g}"


def _points(store: Store, title: str) -> dict[float, tuple[list[float], float]]:
    """Alpha -> accuracies of the seeds, mean cosine distance of the layers at the end."""
    found = {}
    for arm in store.arms:
        if arm.startswith(f"{title}, ") and (errors := store.last(arm)):
            ends = [run["rotation"]["distance"][-1] for run in store.runs(arm)]
            turned = [distance for end in ends for distance in end if distance is not None]
            mean = statistics.mean(turned) if turned else float("nan")
            found[store.settings(arm)["alpha"]] = [100 - error for error in errors], mean
    return dict(sorted(found.items()))


def table(store: Store) -> Table:
    by_title = {title: _points(store, title) for title in COLOURS}
    rows = []
    for alpha in sorted(set().union(*by_title.values())):
        row = [f"{alpha:g}"]
        for points in by_title.values():
            accuracies, turned = points.get(alpha, ([], 0.0))
            row += [report.mean_std(accuracies), f"{turned:.2f}" if accuracies else "-"]
        rows.append(row)
    header = [f"{title}: {what}" for title in COLOURS for what in ("test accuracy, %", "rotation")]
    return report.table_of(["alpha", *header], rows, store.content["network"])


def plot(store: Store, path: Path) -> Path:
    """Accuracy over alpha and over rotation; rotation curves of each optimizer at some alphas."""
    alphas = sorted({alpha for title in COLOURS for alpha in _points(store, title)})
    shown = sorted({alphas[0], min(alphas, key=abs), alphas[-1]})
    figure = Figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(3, 6)
    left, right = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for row, (title, colour) in enumerate(COLOURS.items(), 1):
        points = _points(store, title)
        means = [statistics.mean(accuracies) for accuracies, _ in points.values()]
        off = [statistics.stdev(v) if len(v) > 1 else 0.0 for v, _ in points.values()]
        left.errorbar(list(points), means, off, fmt="o-", color=colour, label=title, capsize=3)
        right.plot([turned for _, turned in points.values()], means, "o", color=colour, label=title)
        for alpha, mean in zip(points, means, strict=True):
            offset = (3, 3) if title == "SGD" else (3, -9)
            where = {"xy": (points[alpha][1], mean), "xytext": offset, "color": colour}
            right.annotate(f"{alpha:g}", textcoords="offset points", fontsize="small", **where)
        for column, alpha in enumerate(shown):
            axes = figure.add_subplot(grid[row, 2 * column : 2 * column + 2])
            runs = store.runs(_name(title, alpha))
            report.rotation(axes, runs[0]["rotation"] if runs else {}, _name(title, alpha))
    left.set(xlabel="alpha", ylabel="test accuracy, %")
    right.set(xlabel="mean cosine distance of the layers from their start", xlim=(0, 1))
    for axes in (left, right):
        axes.grid(**report.GRID)
        axes.legend(frameon=False)
    return report.saved(figure, path)


def experiment(options: argparse.Namespace) -> Experiment:
    setting, cpu = _setting(options), options.scale == "cpu"
    if options.alphas is None:
        options.alphas = CPU_ALPHAS if cpu else ALPHAS
        options.alphas = (-0.6, 0.0, 0.6) if options.quick else options.alphas
    return Experiment(
        name=f"layca_alpha_{options.task}",
        data=setting.data,
        network=setting.words,
        full=Budget(seeds=1, batch=128, epochs=setting.epochs),
        cpu=Budget(seeds=3, batch=32, iterations=3000, items=5000),
        quick=Budget(seeds=1, batch=32, iterations=15, items=256),
        arms=arms,
        table=table,
        plot=plot,
        evals=5 if cpu else 10,
        records=25 if cpu else 50,
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, default="c10", help="data set and network")
    parser.add_argument("--alphas", type=float, nargs="+", help="default: the paper's 13")


def run(argv: Sequence[str] | None = None) -> Store:
    return main(__doc__, experiment, argv, arguments)


if __name__ == "__main__":
    run()
