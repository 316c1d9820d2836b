"""Bars of step time over torch's fused step, from a JSON file of ``bench.step_time``.

python -m bench.plot_step_time step_time.json step_time.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.goals import GPU_RATIO_LIMITS, RATIO_LIMITS
from bench.peers import BASELINES
from bench.shapes import TINY

COLOURS = {"layerlr": "#1b7f79", "torch": "#8a8d91"}
PEER = "#d9a441"
WIDEST = 8.0  # ratios beyond are cut off, their number still written


def plot(source: Path, target: Path) -> Path:
    """One panel per model and family; the bar is the median, the line its 20 to 80% quantiles.

    Of a run over several dtypes, the first; of a GPU's, the models that are more than host time.
    """
    content = json.loads(source.read_text())
    machine = content["machine"]
    gpu = "gpu" in machine
    rows = [r for r in content["rows"] if r["ratio"] and not (gpu and r["model"] in TINY)]
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    panels = list(dict.fromkeys((row["model"], row["family"]) for row in rows))
    if not panels:
        raise ValueError(f"{source} has no rows")
    limits = GPU_RATIO_LIMITS if gpu else RATIO_LIMITS
    columns = min(4 if gpu else 2, len(panels))
    grid = -(-len(panels) // columns)
    tallest = max(sum((r["model"], r["family"]) == p for r in rows) for p in panels)
    size = (7.0 * columns, grid * (0.27 * tallest + 1.0) + 0.4)
    figure, axes = plt.subplots(grid, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        mine = [r for r in rows if (r["model"], r["family"]) == panel]
        _panel(axis, mine, limits.get(panel[0], {}))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    where = machine["gpu"] if gpu else f"{machine['cpu']}, {machine['threads']} thread(s)"
    figure.suptitle(f"opt.step(): {where}, torch {machine['torch']}", fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


def _panel(axis: Axes, rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> None:
    rows = sorted(rows, key=lambda row: row["ratio"]["median"], reverse=True)
    model, family = rows[0]["model"], rows[0]["family"]
    widest = min(WIDEST, 1.02 * max(row["ratio"]["q80"] for row in rows))
    for y, row in enumerate(rows):
        ratio = row["ratio"]
        low, high = ratio["median"] - ratio["q20"], ratio["q80"] - ratio["median"]
        colour = COLOURS.get(row["package"], PEER)
        error = {"elinewidth": 0.8, "ecolor": "#333333"}
        length = min(ratio["median"], widest)
        whisker = [[low], [high]] if ratio["q80"] <= widest else None
        axis.barh(y, length, 0.72, color=colour, xerr=whisker, error_kw=error)
        right = ratio["q80"] if whisker else length
        limit = limits.get(row["contender"])
        if limit is not None:
            axis.plot([limit, limit], [y - 0.42, y + 0.42], color="#b3261e", linewidth=1.6)
            right = max(right, limit)
        axis.text(right + 0.012 * widest, y, f"{ratio['median']:.2f}", va="center", fontsize=7)
    axis.axvline(1.0, color="#333333", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["contender"] for row in rows], fontsize=7)
    axis.set_xlim(0, 1.12 * widest)
    axis.tick_params(axis="x", labelsize=7)
    goal = "   (red: the goal)" if limits else ""
    axis.set_xlabel(f"times {BASELINES[family]}{goal}", fontsize=8)
    axis.set_title(f"{model}, {rows[0]['dtype']}", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.plot_step_time", description=__doc__)
    p.add_argument("source", type=Path, help="a .json of bench.step_time")
    p.add_argument("target", type=Path, help="a .png, .svg or .pdf to write")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    print(plot(args.source, args.target))


if __name__ == "__main__":
    main()
