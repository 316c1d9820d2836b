"""Fixed rates against rates that a rule computes, by iterations and by time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from bench.config import Config
from bench.data import Data
from bench.trainer import Task

from . import report
from .runner import Arm, Scope
from .store import Store

Run = dict[str, Any]
GREY = "#bbbbbb"


@dataclass(frozen=True)
class Direction:
    """An optimizer of `bench.config.OPTIMIZERS`, the fixed rates it is given and its settings."""

    title: str
    optimizer: str
    rates: Sequence[float]
    settings: Mapping[str, Any] = field(default_factory=dict)


def arms(
    scope: Scope,
    task: Callable[[Config, Data], Task],
    directions: Sequence[Direction],
    curvatures: Mapping[str, tuple[str, ...]],
) -> list[Arm]:
    """Each direction with its fixed rates, then with the untuned steps of each curvature.

    `curvatures` maps a name to the rule's options.
    """
    found = []
    for direction in directions:
        base = scope.config(
            optimizer=direction.optimizer, schedule="constant", **direction.settings
        )
        for rate in direction.rates:
            found.append(Arm(f"{direction.title}, rate {rate:g}", replace(base, lr=rate), task))
        for name, options in curvatures.items():
            config = replace(base, rule="curvature", rule_options=options, layers="module", lr=1.0)
            found.append(Arm(f"{direction.title} + curvature, {name}", config, task))
    return found


# --- what a store says of time ---


def sound(store: Store, arm: str) -> list[Run]:
    """The runs of an arm that did not diverge."""
    return [run for run in store.runs(arm) if not run["final"]["diverged"]]


def steps_of(run: Run) -> list[float]:
    """Where the points of its train loss lie: each is the mean since the point before."""
    return run["losses"]["step"]


def seconds_of(run: Run) -> list[float]:
    """When it reached them, tests left out; between two tests all steps count alike."""
    steps, seconds = ([0, *(test[key] for test in run["records"])] for key in ("step", "seconds"))
    return np.interp(steps_of(run), steps, seconds).tolist()


def step_ms(runs: Sequence[Run]) -> float:
    """Milliseconds of a step: the median over runs of their medians."""
    return statistics.median(run["final"]["step_ms"] for run in runs)


def fixed(store: Store, arms: Sequence[str]) -> list[str]:
    return [arm for arm in arms if store.settings(arm)["rule"] == "none"]


def plain(store: Store) -> list[Run]:
    """What times are compared with: SGD with momentum at any fixed rate."""
    arms = fixed(store, store.arms)
    sgd = [arm for arm in arms if store.settings(arm)["optimizer"] == "momentum"]
    return [run for arm in sgd for run in sound(store, arm)]


def best(store: Store, arms: Sequence[str]) -> str | None:
    """The arm whose train loss ends lowest, of those of which no seed diverged."""
    whole = [arm for arm in arms if sound(store, arm) == store.runs(arm)]
    return min(whole, key=lambda arm: _mean_curves(store, arm)[2][-1], default=None)


def _mean_curves(store: Store, arm: str) -> tuple[list[float], list[float], list[float]]:
    """Steps, seconds and train losses, means over the seeds that did not diverge."""
    runs = sound(store, arm)
    if not runs:
        return [], [], []
    seconds = np.mean([seconds_of(run) for run in runs], 0)
    losses = np.mean([run["losses"]["loss"] for run in runs], 0)
    return steps_of(runs[0]), seconds.tolist(), losses.tolist()


# --- table and plot ---


def table(store: Store, columns: int = 4) -> Table:
    """A line an arm: train loss after some steps and in SGD's time, last test, time a step."""
    reference = plain(store)
    lengths = [steps_of(run) for arm in store.arms for run in sound(store, arm)]
    grid = max(lengths, key=len, default=[])
    asked = list(range(len(grid)))[:: -max(-(-len(grid) // columns), 1)][::-1]
    header = ["", "seeds", *(f"step {grid[i]}" for i in asked)]
    header += ["in SGD's time", report.LABELS[store.metric], "s a step", "of SGD's"]
    rows = []
    for arm in store.arms:
        runs, count = sound(store, arm), len(store.runs(arm))
        name = f"{arm} ({count - len(runs)} of {count} diverged)" if len(runs) < count else arm
        cells = [_digits([run["losses"]["loss"][i] for run in runs]) for i in asked]
        cells.append(_digits(_losses_at(runs, reference)))
        scale = 100 if store.metric == "test_error" else 1
        cells.append(report.mean_std([scale * run["final"][store.metric] for run in runs]))
        ours = step_ms(store.runs(arm))
        cells.append(f"{ours / 1e3:.3g}")
        cells.append(f"{ours / step_ms(reference):.2f}" if reference else "-")
        rows.append([name, str(count), *cells])
    return report.table_of(header, rows, "train loss, mean over the steps before")


def _losses_at(runs: Sequence[Run], reference: Sequence[Run]) -> list[float]:
    """Train losses when the reference runs were over (at the end, where that was sooner)."""
    if not reference:
        return []
    end = statistics.median(run["final"]["seconds"] for run in reference)
    return [float(np.interp(end, seconds_of(run), run["losses"]["loss"])) for run in runs]


def _digits(values: Sequence[float]) -> str:
    """Four significant digits whatever the loss' scale."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def plot(store: Store, path: Path) -> Path:
    """A row a direction: train loss over steps and seconds, test over steps.

    Of the fixed rates the best is named, the others are grey.
    """
    titles: dict[str, list[str]] = {}
    for arm in store.arms:
        titles.setdefault(arm.partition(" + ")[0].partition(", ")[0], []).append(arm)
    figure = Figure(figsize=(14, 4 * len(titles)), layout="constrained")
    grid = figure.subplots(len(titles), 3, squeeze=False)
    for (title, arms), row in zip(titles.items(), grid, strict=True):
        chosen = best(store, fixed(store, arms))
        grey = [arm for arm in fixed(store, arms) if arm != chosen]
        named = dict(zip([arm for arm in arms if arm not in grey], report.COLOURS, strict=False))
        for axes, what in zip(row, ("iteration", "seconds"), strict=False):
            axes.set_title(title, fontsize="medium")
            _train(axes, store, dict.fromkeys(grey, GREY) | named, what)
        report.lines(row[2], store, list(named), list(named.values()))
    return report.saved(figure, path)


def _train(axes: Axes, store: Store, colours: Mapping[str, str], what: str) -> None:
    """Train losses of the arms, on a logarithmic scale that ends where they start."""
    starts = []
    for arm, colour in colours.items():
        steps, seconds, losses = _mean_curves(store, arm)
        if not losses:
            continue
        label, front = ("other fixed rates", 1) if colour == GREY else (arm, 2)
        if label in axes.get_legend_handles_labels()[1]:
            label = None  # named already
        x = steps if what == "iteration" else seconds
        axes.plot(x, losses, color=colour, label=label, linewidth=1.3, zorder=front)
        starts.append(losses[0])
    axes.set(xlabel=what, ylabel="train loss", yscale="log")
    if starts and axes.get_ylim()[1] > 2 * min(starts):
        axes.set_ylim(top=2 * min(starts))
    axes.grid(**report.GRID)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")
