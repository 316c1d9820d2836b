"""Tables and plots from a store alone, for experiments that need none of their own."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from .store import Store

GRID = {"color": "#dddddd", "linewidth": 0.6}
# Okabe and Ito's palette: told apart by the colour-blind and in grey.
COLOURS = ("#444444", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
LABELS = {"test_error": "test error, %", "test_loss": "test loss"}


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table_of(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """A table that prints as Markdown."""
    table = Table(title=title or None, box=box.MARKDOWN)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(table: Table) -> str:
    console, title = Console(file=io.StringIO(), width=1000), table.title
    table.title = None  # which would be wrapped to the table's width
    console.print(table)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]  # type: ignore
    return (f"{title}:\n\n" if title else "") + "\n".join(filter(None, lines)) + "\n"


def errors(store: Store, columns: int = 5) -> Table:
    """A line an arm: the metric at some steps, mean and deviation over the seeds."""
    steps = sorted({step for arm in store.arms for step in store.series(arm)})
    chosen = steps[:: -max(-(-len(steps) // columns), 1)][::-1]
    rows = []
    for arm in store.arms:
        series, runs = store.series(arm), store.runs(arm)
        diverged = sum(run["final"]["diverged"] for run in runs)
        name = arm + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")
        rows.append([name, str(len(runs)), *(mean_std(series.get(step, [])) for step in chosen)])
    what = LABELS[store.metric]
    return table_of(["", "seeds", *(f"step {step}" for step in chosen)], rows, what)


def curves(store: Store, path: Path) -> Path:
    """The metric over the steps and the layers' rotation, first seed, of every arm."""
    arms = store.arms
    columns = min(len(arms), 4)
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(max(3 * columns, 8), 3.6 + 2.4 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[1.5] + [1] * rows)
    lines(figure.add_subplot(grid[0, :]), store, arms)
    for i, arm in enumerate(arms):
        axes = figure.add_subplot(grid[1 + i // columns, i % columns])
        rotation(axes, store.runs(arm)[0]["rotation"], arm)
    return saved(figure, path)


def lines(
    axes: Axes, store: Store, arms: Sequence[str], colours: Sequence[Any] | None = None
) -> None:
    """The metric over the steps: mean over the seeds, and a band of one deviation."""
    for i, arm in enumerate(arms):
        series = store.series(arm)
        if not series:
            continue
        steps, values = list(series), list(series.values())
        colour = colours[i] if colours else spread(i, len(arms))
        means = [statistics.mean(v) for v in values]
        axes.plot(steps, means, "o-", color=colour, label=arm, markersize=3, linewidth=1.3)
        if all(len(v) > 1 for v in values):
            off = [statistics.stdev(v) for v in values]
            low, high = ([m + s * d for m, d in zip(means, off, strict=True)] for s in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="iteration", ylabel=LABELS[store.metric])
    axes.grid(**GRID)
    if arms:
        axes.legend(frameon=False, fontsize="small", ncols=1 if len(arms) < 9 else 3)


def pairs(store: Store, groups: Mapping[str, Mapping[str, str]], path: Path) -> Path:
    """The metric at the end: title -> label -> arm; a line a seed, the mean in colour."""
    figure = Figure(figsize=(2.6 * len(groups), 3.6), layout="constrained")
    grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axes, (title, arms) in zip(grid[0], groups.items(), strict=True):
        sides = [store.last(arm) for arm in arms.values()]
        for seed in zip(*sides, strict=True):
            axes.plot(seed, "o-", color="#bbbbbb", markersize=4)
        axes.plot([statistics.mean(side) for side in sides], "s-", color="#0072B2", label="mean")
        rates = [f"{store.settings(arm)['lr']:.3g}" for arm in arms.values()]
        words = [f"{label}\n{rate}" for label, rate in zip(arms, rates, strict=True)]
        axes.set_xticks(range(len(arms)), words)
        axes.set(title=title, xlim=(-0.4, len(arms) - 0.6))
        axes.grid(**GRID)
    grid[0, 0].set_ylabel(LABELS[store.metric])
    grid[0, 0].set_xlabel("below: the rate")
    grid[0, 0].legend(frameon=False)
    return saved(figure, path)


def rotation(axes: Axes, curve: dict[str, Any], title: str) -> None:
    """As the Layca paper draws it: viridis, first layer dark, last yellow, y from 0 to 1."""
    axes.set_ylim(0, 1)
    axes.set_title(title, fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(**GRID)
    if not curve:
        return
    last = max(len(curve["names"]) - 1, 1)
    for i in range(len(curve["names"])):
        colour = colormaps["viridis"](i / last)
        axes.plot(curve["steps"], [row[i] for row in curve["distance"]], color=colour)


def spread(i: int, count: int) -> Any:
    return COLOURS[i] if count <= len(COLOURS) else colormaps["turbo"](i / (count - 1))


def saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
