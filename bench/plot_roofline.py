"""Steps against the roof: shares of the copy's bandwidth, drawn from `bench.roofline`'s points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.goals import GPU_OF_COPY
from bench.roofline import Point

# Okabe and Ito's palette: told apart by the colour-blind and in grey.
COLOURS = {
    "cuda": "#0072B2",
    "triton": "#E69F00",
    "cpu": "#0072B2",
    "reference": "#CC79A7",
    "torch": "#444444",
}
OTHER = "#009E73"


def plot(points: Sequence[Point], content: dict[str, Any], target: Path) -> Path:
    """A row of panels per family and dtype, a panel per rule, a line per model and backend.

    The full dot counts the bytes of two passes, the hollow one those of one reading.
    """
    kinds = list(dict.fromkeys((p.dtype, p.family) for p in points))
    rules = {f: list(dict.fromkeys(p.rule for p in points if p.family == f)) for _, f in kinds}
    models = list(dict.fromkeys(p.model for p in points))
    backends = list(dict.fromkeys(p.backend for p in points))
    columns = max(len(some) for some in rules.values())
    height = (0.11 * len(backends) + 0.12) * len(models) + 0.4
    figure = Figure(figsize=(3.0 * columns + 1.0, height * len(kinds) + 1.4), layout="constrained")
    grid = figure.subplots(len(kinds), columns, sharex=True, sharey=True, squeeze=False)
    for row, (dtype, family) in zip(grid, kinds, strict=True):
        for axes in row[len(rules[family]) :]:
            axes.set_axis_off()
        for axes, rule in zip(row, rules[family], strict=False):
            key = (dtype, family, rule)
            mine = [p for p in points if (p.dtype, p.family, p.rule) == key]
            _panel(axes, mine, models, backends)
            axes.set_title(f"{family}, {rule or 'no rule'}, {dtype}", fontsize="small")
    highest = max(max(p.once, p.two_pass or 0.0) for p in points)
    grid[0][0].set_xlim(0, max(1.1, 1.05 * highest))
    figure.supxlabel(
        f"share of a copy's bandwidth, {content['copy_gb_per_s']:,.0f} GB/s "
        f"(dashed: the roof; dotted: {GPU_OF_COPY:.0%})",
        fontsize="small",
    )
    machine = content["machine"]
    figure.legend(
        handles=_legend(backends),
        title=f"opt.step(): {machine.get('gpu', machine['cpu'])}, torch {machine['torch']}",
        loc="outside upper center",
        ncols=len(backends) + 2,
        frameon=False,
        fontsize="small",
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    return target


def _panel(
    axes: Axes,
    points: Sequence[Point],
    models: Sequence[str],
    backends: Sequence[str],
) -> None:
    axes.axvline(1.0, color="#444444", linewidth=1.0, linestyle="--")
    axes.axvline(GPU_OF_COPY, color="#b3261e", linewidth=1.0, linestyle=":")
    for line in range(1, len(models)):
        axes.axhline(line - 0.5, color="#dddddd", linewidth=0.6)
    for p in points:
        offset = (backends.index(p.backend) - (len(backends) - 1) / 2) * 0.8 / len(backends)
        y, colour = models.index(p.model) + offset, COLOURS.get(p.backend, OTHER)
        if p.two_pass is not None and p.two_pass_bytes != p.once_bytes:
            axes.plot([p.once, p.two_pass], [y, y], color=colour, linewidth=1.2)
            axes.plot(p.two_pass, y, "o", color=colour, markersize=4.5)
        axes.plot(p.once, y, "o", color=colour, markersize=4.5, markerfacecolor="white")
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(backends: Sequence[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=COLOURS.get(name, OTHER), linewidth=3, label=name) for name in backends
    ]
    dot = {"color": "#444444", "linestyle": "", "marker": "o", "markersize": 5}
    handles.append(Line2D([], [], **dot, markerfacecolor="white", label="read-once bytes"))
    handles.append(Line2D([], [], **dot, label="two-pass bytes"))
    return handles
