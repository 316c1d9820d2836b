"""Figures, drawn from results alone; matplotlib's object interface, so no backend is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .record import Result

# Okabe and Ito's palette: told apart by the colour-blind and in grey.
RULE_COLOURS = {
    "none": "#444444",
    "singh": "#E69F00",
    "layca": "#0072B2",
    "lars": "#009E73",
    "lamb": "#CC79A7",
}
_GRID = {"color": "#dddddd", "linewidth": 0.6}


# --- training runs ---

# (optimizer's title, [(rule, its results over the seeds)])
Rows = Sequence[tuple[str, Sequence[tuple[str, Sequence[Result]]]]]


def run(result: Result, out: Path) -> list[Path]:
    """Loss, layer rotation and, under a rule, each layer's rate, as ``NAME.png``."""
    panels = 3 if result.rates else 2
    figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
    axes = list(figure.subplots(1, panels))
    _loss_lines(axes[0], result)
    if lines := rotation_lines(axes[1], result.rotation):
        axes[1].legend(handles=_some(lines), frameon=False, fontsize="small", loc="upper left")
    axes[1].set(xlabel="step", ylabel="cosine distance from the start")
    if result.rates:
        lines = _some(_lines(axes[2], result.rates, "lr"))
        axes[2].set_yscale("log", nonpositive="mask")
        axes[2].set(xlabel="step", ylabel="effective learning rate")
        axes[2].grid(**_GRID)
        axes[2].legend(handles=lines, frameon=False, fontsize="small", loc="lower left")
    figure.suptitle(result.name)
    return [_saved(figure, out / f"{result.name}.png")]


def _loss_lines(axes: Axes, result: Result) -> None:
    losses = _numbers(result.losses)
    axes.plot(range(1, len(losses) + 1), losses, color="#bbbbbb", linewidth=0.7, label="mini-batch")
    smooth = smoothed(losses)
    axes.plot(range(1, len(smooth) + 1), smooth, color="#0072B2", label="mini-batch, smoothed")
    tests = [(r["step"], r["test_loss"]) for r in result.records if r["test_loss"] is not None]
    if tests:
        axes.plot(*zip(*tests, strict=True), "o", color="#D55E00", markersize=4, label="test")
    axes.set_yscale("log", nonpositive="mask")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(**_GRID)


def losses(rows: Rows, path: Path) -> Path:
    """Smoothed training loss, a panel per optimizer, a line per rule (mean over its seeds)."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(2, -(-len(rows) // 2), sharex=True, sharey=True, squeeze=False)
    for axes, (title, variants) in zip(panels.flat, rows, strict=False):
        for rule, results in variants:
            curves = [smoothed(_numbers(r.losses)) for r in results]
            mean = [sum(column) / len(column) for column in zip(*curves, strict=False)]
            axes.plot(
                range(1, len(mean) + 1),
                mean,
                color=RULE_COLOURS.get(rule),
                label="bare" if rule == "none" else rule,
                linewidth=1.4,
            )
        axes.set_yscale("log", nonpositive="mask")
        axes.set_title(title, fontsize="medium")
        axes.grid(**_GRID)
        axes.legend(frameon=False, fontsize="small", loc="lower left")
    for axes in panels.flat[len(rows) :]:
        axes.remove()
    figure.supxlabel("step")
    figure.supylabel("training loss (mean over seeds, smoothed)")
    return _saved(figure, path)


def rotations(rows: Rows, path: Path) -> Path:
    """Layer rotation of the first seed: a row per rule, a column per optimizer."""
    rules = list(dict.fromkeys(rule for _, variants in rows for rule, _ in variants))
    size = (2.3 * len(rows) + 0.8, 2.1 * len(rules) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rules), len(rows), squeeze=False)
    legend: list[Line2D] = []
    for column, (title, variants) in enumerate(rows):
        by_rule = dict(variants)
        for axes, rule in zip(panels[:, column], rules, strict=True):
            if rule not in by_rule:
                axes.axis("off")
                continue
            legend = rotation_lines(axes, by_rule[rule][0].rotation) or legend
            axes.set_title(title if rule == "none" else f"{title} + {rule}", fontsize="small")
            axes.tick_params(labelsize="small")
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("cosine distance of each layer from its start", fontsize="medium")
    if legend := _some(legend):
        figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False)
    return _saved(figure, path)


def rotation_lines(axes: Axes, rotation: dict[str, Any]) -> list[Line2D]:
    """As the Layca paper draws it: viridis, first layer dark, last yellow, y from 0 to 1."""
    axes.set_ylim(0, 1)
    axes.grid(**_GRID)
    if not rotation:
        return []
    return _lines(axes, rotation, "distance")


def _lines(axes: Axes, table: dict[str, Any], key: str) -> list[Line2D]:
    names, last = table["names"], max(len(table["names"]) - 1, 1)
    return [
        axes.plot(
            table["steps"],
            [row[i] for row in table[key]],
            color=colormaps["viridis"](i / last),
            label=name,
        )[0]
        for i, name in enumerate(names)
    ]


def _some(lines: list[Line2D], most: int = 8) -> list[Line2D]:
    """Evenly spaced ones for a legend: deep networks have more layers than a legend has room."""
    count = min(len(lines), most)
    return [lines[round(i * (len(lines) - 1) / max(count - 1, 1))] for i in range(count)]


def smoothed(values: Sequence[float], window: int = 20) -> list[float]:
    """Mean of the last `window` values (of all so far at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _numbers(losses: Sequence[float | None]) -> list[float]:
    """The losses up to the first that is not a number: what follows a divergence says nothing."""
    finite = []
    for loss in losses:
        if loss is None or loss != loss or loss == float("inf"):
            break
        finite.append(loss)
    return finite


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
