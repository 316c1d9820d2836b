"""What a store of `char_gpt` says: loss at the best rate, the valley, what carries over."""

from __future__ import annotations

import math
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from . import report
from .evidence import Values, less
from .store import Store

Run = dict[str, Any]
CHANCE = math.log(65)  # nats: all characters of the text equally likely
REST = ", plain rest"
COLOURS = {
    "SGD": "#E69F00",
    "AdamW, two rates": "#56B4E9",
    "Adam + hyperball": "#CC79A7",
    "Adam + layca": "#0072B2",
    "AdamW + lamb": "#D55E00",
    "AdamW + singh": "#009E73",
    "SGD + layca": "#88CCEE",
    "SGD + lars": "#AA4499",
    "Muon": "#117733",
    "Muon + hyperball": "#882255",
}
TOLERANCE = 0.05  # nats above the best: what still counts as the valley
_NAME = re.compile(r"(?P<title>.*), rate (?P<rate>[^,]*)(, (?P<size>.*))?")
Curve = dict[float, Values]  # rate -> loss by seed


def families(store: Store, size: str | None = None) -> dict[str, Curve]:
    """Title -> losses by rate and seed, at a size."""
    found: dict[str, Curve] = {}
    for arm in store.arms:
        match = _NAME.fullmatch(arm)
        if match and match["size"] == size:
            rate = store.settings(arm)["lr"]
            found.setdefault(match["title"], {})[rate] = store.by_seed(arm, loss)
    return {title: dict(sorted(curve.items())) for title, curve in found.items()}


def sizes(store: Store) -> list[str]:
    matches = [_NAME.fullmatch(arm) for arm in store.arms]
    return list(dict.fromkeys(m["size"] for m in matches if m and m["size"]))


def loss(run: Run) -> float:
    """At the end; a run that diverged knows nothing."""
    final = run["final"]
    return CHANCE if final["diverged"] or final["test_loss"] is None else final["test_loss"]


def best_rate(curve: Curve, place: int = 0) -> float:
    """Of the lowest mean; place 1: of the second lowest."""
    return sorted(curve, key=lambda rate: _mean(curve[rate]))[place]


def adamw(store: Store) -> str:
    """The title of AdamW at its best decay."""
    found = families(store)
    titles = [title for title in found if title.startswith("AdamW, decay")]
    return min(titles, key=lambda t: _mean(found[t][best_rate(found[t])]))


def octaves(curve: Curve, seed: str) -> float:
    """Width of the valley in factors of 2: rates whose loss is within `TOLERANCE` of the best.

    Linear between rates; a valley that reaches the grid's edge ends there.
    """
    points = [(math.log2(rate), v[seed]) for rate, v in curve.items() if seed in v]
    limit = min(value for _, value in points) + TOLERANCE
    width = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        low, high = sorted((y0, y1))
        if high <= limit:
            width += x1 - x0
        elif low <= limit:
            width += (x1 - x0) * (limit - low) / (high - low)
    return width


def valley(curve: Curve) -> Values:
    """`octaves` of each seed."""
    return {seed: octaves(curve, seed) for seed in curve[best_rate(curve)]}


def steps_to(run: Run, target: float) -> float:
    """Steps to a test loss, linear between tests; without end where it is not reached."""
    before: tuple[float, float] | None = None
    for record in run["records"]:
        step, value = record["step"], record["test_loss"]
        if value is None:
            return math.inf
        if value <= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - value)
        before = (step, value)
    return math.inf


def arm_of(store: Store, title: str, rate: float, size: str | None = None) -> str:
    for arm in store.arms:
        match = _NAME.fullmatch(arm)
        if match and match["title"] == title and match["size"] == size:
            if store.settings(arm)["lr"] == rate:
                return arm
    raise ValueError(f"{store.path}: no {title} at rate {rate:g}")


def steps_needed(store: Store, title: str) -> Values:
    """Of each seed, at the best rate: parts of the run to the mean last loss of AdamW's best."""
    found, reference = families(store), adamw(store)
    target = _mean(found[reference][best_rate(found[reference])])
    arm = arm_of(store, title, best_rate(found[title]))
    whole = store.settings(arm)["steps"]
    return store.by_seed(arm, lambda run: steps_to(run, target) / whole)


def regrets(store: Store, title: str, place: int = 0) -> Values:
    """Loss at the rate that was carried over less the best of three there, mean over the sizes.

    ``place``: which of the rates is carried, the best one or the second best.
    """
    rate, parts = best_rate(families(store)[title], place), []
    for size in sizes(store):
        curve = families(store, size).get(title, {})
        if len(curve) == 3 and rate in curve:
            parts.append(less(curve[rate], curve[best_rate(curve)]))
    if not parts:
        return {}
    seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
    return {seed: statistics.mean(part[seed] for part in parts) for seed in seeds}


def table(store: Store) -> Table:
    """A line a family: loss at the best rate, steps to AdamW's, the valley, what carries over."""
    found, rows = families(store), []
    reference = adamw(store) if any(t.startswith("AdamW, decay") for t in found) else None
    for title, curve in found.items():
        rate = best_rate(curve)
        edge = " (edge)" if rate in (min(curve), max(curve)) else ""
        runs = [run for rate in curve for run in store.runs(arm_of(store, title, rate))]
        diverged = sum(run["final"]["diverged"] for run in runs)
        needed = _mean(steps_needed(store, title)) if reference else math.inf
        rows.append(
            [
                title,
                f"{rate:.3g}{edge}",
                report.mean_std(list(curve[rate].values()), 3),
                f"{100 * needed:.0f}%" if math.isfinite(needed) else "never",
                report.mean_std(list(valley(curve).values()), 1),
                report.mean_std(list(regrets(store, title).values()), 3),
                str(diverged) if diverged else "",
            ]
        )
    header = ["", "best rate", "validation loss", "steps to AdamW's", "valley, octaves"]
    return report.table_of(
        [*header, "loss by carrying the rate over", "diverged"],
        rows,
        "after the last step, mean and deviation over the seeds; the valley is within "
        f"{TOLERANCE} of the best",
    )


def plot(store: Store, path: Path) -> Path:
    """Loss at the best rate, family by family; loss against the rate; the same at other sizes."""
    found, others = families(store), sizes(store)
    reference = adamw(store) if any(t.startswith("AdamW, decay") for t in found) else ""
    rest = [t for t in found if t.endswith(REST) or t == "AdamW, two rates"]
    decays = [t for t in found if t.startswith("AdamW, decay") and t != reference]
    line = [t for t in found if t not in [*rest, *decays]]
    columns = max(3, len(others))
    figure = Figure(figsize=(5 * columns, 9.5 if others else 5), layout="constrained")
    grid = figure.add_gridspec(2 if others else 1, 3 * columns)
    _ranking(figure.add_subplot(grid[0, :columns]), found, reference)
    for i, (titles, what) in enumerate(((line, "one line swapped"), (rest, "plain rest")), 1):
        axes = figure.add_subplot(grid[0, i * columns : (i + 1) * columns])
        shown = titles if reference in titles or not reference else [reference, *titles]
        _valleys(axes, {title: found[title] for title in shown}, reference)
        axes.set_title(what, fontsize="medium")
    for i, size in enumerate(others):
        axes = figure.add_subplot(grid[1, 3 * i : 3 * i + 3])
        curves = families(store, size)
        _valleys(axes, curves, reference, {t: best_rate(found[t]) for t in curves if t in found})
        axes.set_title(size, fontsize="medium")
    drawn = {line.get_label(): line for axes in figure.axes[1:] for line in axes.get_lines()}
    keys = {str(label): line for label, line in drawn.items() if label in map(_label, found)}
    figure.legend(keys.values(), keys.keys(), loc="outside right center", frameon=False)
    return report.saved(figure, path)


def _label(title: str) -> str:
    return title.removesuffix(REST)


def _ranking(axes: Axes, found: dict[str, Curve], reference: str) -> None:
    """A dot a seed at the best rate, the best family on top; hollow where that is at the edge."""
    best = {title: curve[best_rate(curve)] for title, curve in found.items()}
    order = sorted(best, key=lambda title: _mean(best[title]))
    for at, title in enumerate(order):
        values, edge = list(best[title].values()), best_rate(found[title]) in _ends(found[title])
        face = "white" if edge else _colour(title, reference)
        dots = {"color": _colour(title, reference), "markerfacecolor": face, "markersize": 5}
        axes.plot(values, [at] * len(values), "o", **dots)
        axes.plot([_mean(best[title])], [at], "|", color=dots["color"], markersize=14)
    if reference:
        axes.axvline(_mean(best[reference]), color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(order)), [t + " *" * (t == reference) for t in order])
    axes.tick_params(axis="y", labelsize="small")
    axes.invert_yaxis()
    axes.grid(**report.GRID)
    axes.set_title("best rate, each seed (hollow: edge of the grid)", fontsize="medium")
    axes.set_xlabel("validation loss   < better")


def _ends(curve: Curve) -> tuple[float, float]:
    return min(curve), max(curve)


def _rule(title: str) -> str:
    """What a family has in common with those of the same colour: the rule, or the optimizer."""
    return _label(title).split(", ")[0]


def _colour(title: str, reference: str) -> Any:
    """AdamW at its best black, its other decays grey, a rule the same colour in every panel."""
    if title == reference:
        return "black"
    return COLOURS.get(_rule(title) if title != "AdamW, two rates" else title, "#999999")


def _valleys(
    axes: Axes, curves: dict[str, Curve], reference: str, around: dict[str, float] | None = None
) -> None:
    """Mean loss against the rate, in units of each family's best, or of the rates `around`."""
    lowest = []
    for title, curve in curves.items():
        unit = best_rate(curve) if around is None else around.get(title, 1.0)
        means = {rate / unit: _mean(values) for rate, values in curve.items()}
        lowest.append(min(means.values()))
        look = {"color": _colour(title, reference), "markersize": 3}
        look["linestyle"] = "--" if "layca" in title else "-"  # hyperball's curve is below it
        axes.plot(list(means), list(means.values()), marker="o", label=_label(title), **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    if around is not None:
        axes.axvline(1, color="#444444", linewidth=0.8)
    if lowest:
        axes.set_ylim(min(lowest) - 0.02, min(lowest) + 0.45)
    rate = "rate over its best" if around is None else "rate over the one carried over"
    axes.set(xlabel=rate, ylabel="validation loss")
    axes.grid(**report.GRID)


def _mean(values: Values) -> float:
    return statistics.mean(values.values())
