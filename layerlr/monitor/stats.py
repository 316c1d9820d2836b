"""What an optimizer's layer rules did, step by step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .copies import HasLayerStats, snapshot, with_layer_stats
from .plotting import draw
from .recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# quantity: (what the plot calls it, scale of the plot); wu has a sign, so it is not logarithmic
_QUANTITIES = {
    "ww": ("squared norm of the weights", "log"),
    "gg": ("squared norm of the gradient", "log"),
    "uu": ("squared norm of the update", "log"),
    "wu": ("inner product of weights and update", "linear"),
    "scale": ("factor of the rule", "log"),
    "lr": ("effective learning rate", "log"),
    "angle": ("angle of the step (radians)", "linear"),
    "skipped": ("steps skipped", "linear"),
}


class StatsCurves(NamedTuple):
    """One quantity of `StatsLog`.

    Attributes
    ----------
    names : list of str
        The layers.
    steps : list of float
        The step of each record.
    values : Tensor [records, layers]
        float64, on the host; NaN where a layer did not exist yet.
    """

    names: list[str]
    steps: list[float]
    values: Tensor


class StatsLog(Recorder):
    """Record ``optimizer.layer_stats()``: ww, gg, uu, wu, scale, lr, angle, skipped per layer.

    For curves and plots in the process that trains; `Telemetry` streams the same numbers to files,
    TensorBoard or callbacks and keeps nothing.

    Parameters
    ----------
    optimizer : optimizer of this package
        Anything with ``layer_stats()`` as they have it.

    Notes
    -----
    A record keeps a copy of the last step's numbers in float64: 64 bytes per layer, no pass over
    the weights, no host sync. Its ``angle`` is that of one step; the angle between two records of
    `LayerRotation` may span many.

    Layers that appear later (``add_param_group``) get columns of their own, NaN before. Layers of
    one name (in two groups) become ``name``, ``name#2``.

    Writers see the tags ``layer_ww/<name>``, ``layer_gg/<name>`` and so on.

    Examples
    --------
    >>> log = StatsLog(opt)
    >>> for x, y in batches:
    ...     train(model, opt, x, y)
    ...     log.record()
    >>> log.plot("angles.png", "angle")
    """

    def __init__(self, optimizer: HasLayerStats) -> None:
        super().__init__([], {key: f"layer_{key}" for key in _QUANTITIES})
        self.optimizer = with_layer_stats(optimizer)

    @torch.no_grad()
    def record(self, step: float | None = None) -> None:
        """Append what the optimizer says about its last step.

        Parameters
        ----------
        step : int or float, optional
            The number of the step, or of the epoch; by default one more than at the last record,
            1 at the first.
        """
        number = self._number(step)
        names, _, row = snapshot(self.optimizer.layer_stats(), self._tags)
        if names != self.names:
            row = self._align(names, row)
        self._append(number, row)

    def curves(self, key: str = "lr") -> StatsCurves:
        """Return one quantity over the records.

        Parameters
        ----------
        key : str
            ``ww``, ``gg``, ``uu``, ``wu``, ``scale``, ``lr``, ``angle`` or ``skipped``.

        Raises
        ------
        ValueError
            For another key.
        """
        return StatsCurves(list(self.names), list(self._steps), self._series(key))

    def plot(self, path_or_axes: str | os.PathLike[str] | Axes, key: str = "lr") -> Axes:
        """Draw one quantity, a line per layer in viridis, first layer dark, last layer yellow.

        The vertical axis is logarithmic for ``ww``, ``gg``, ``uu``, ``scale`` and ``lr``.

        Parameters
        ----------
        path_or_axes : path or matplotlib.axes.Axes
            A picture to write (PNG, or what the suffix names), or axes to draw into.
        key : str
            As in `curves`.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ValueError
            For another key.
        """
        values = self._series(key)
        label, scale = _QUANTITIES[key]
        return draw(path_or_axes, self.names, self._steps, values, label=label, scale=scale)

    def _align(self, names: list[str], row: Tensor) -> Tensor:
        """Give new layers columns of their own, and put the row's numbers into their columns."""
        known = set(self.names)
        self.names = self.names + [name for name in names if name not in known]
        if len(self.names) > len(known) and self._steps:
            table = self._table()
            self._blocks = [table.new_full((*table.shape[:2], len(self.names)), torch.nan)]
            self._blocks[0][..., : len(known)] = table
        column = {name: i for i, name in enumerate(self.names)}
        aligned = row.new_full((row.shape[0], len(self.names)), torch.nan)
        aligned[:, [column[name] for name in names]] = row
        return aligned
