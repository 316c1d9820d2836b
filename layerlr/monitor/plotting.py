"""One picture for every per-layer series."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More names than this do not fit beside the axes; evenly spaced ones are shown.
_LEGEND = 12


def draw(
    target: str | os.PathLike[str] | Axes,
    names: Sequence[str],
    steps: Sequence[float],
    values: Tensor,
    *,
    label: str,
    scale: str = "linear",
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw one line per layer, coloured viridis from the first (dark) to the last (yellow).

    Parameters
    ----------
    target : path or Axes
        A path is written (PNG, or what its suffix names) with a legend of up to 12 layers;
        axes are drawn into and left to their owner.
    names : sequence of str
        One per column; the lines carry them as labels.
    steps : sequence of float
        One per row: the horizontal positions.
    values : Tensor [records, layers]
        The vertical positions. Layers that have none (NaN), and on a logarithmic scale zero or
        less, leave a gap.
    label : str
        What is drawn, for the vertical axis.
    scale : str
        ``"linear"`` or ``"log"``; ``"log"`` needs a positive value, and is linear without.
    limits : pair of float, optional
        The vertical limits.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError
        Without matplotlib.

    Notes
    -----
    The figure is made without pyplot: no backend is chosen, no figure stays open, and a thread
    may draw.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from error

    if isinstance(target, (str, os.PathLike)):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
    else:
        axes = target
    last = max(len(names) - 1, 1)
    marker = "." if len(steps) == 1 else None  # a line of one point shows nothing
    lines = [
        axes.plot(steps, column, color=colormaps["viridis"](i / last), label=name, marker=marker)[0]
        for i, (name, column) in enumerate(zip(names, values.T.tolist(), strict=True))
    ]
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if scale == "log" and bool((values > 0).any()):
        axes.set_yscale("log", nonpositive="mask")
    if limits is not None:
        axes.set_ylim(*limits)
    if isinstance(target, (str, os.PathLike)):
        shown = min(len(lines), _LEGEND)
        picked = [lines[round(i * last / max(shown - 1, 1))] for i in range(shown)]
        if picked:
            figure.legend(handles=picked, loc="outside right upper", fontsize="small")
        figure.savefig(target)
    return axes
