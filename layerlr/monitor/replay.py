"""Recorded angles as the schedule of another run."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from layerlr.conditions import is_number
from layerlr.layer_table import LayerTable
from layerlr.optimizer import LayerwiseOptimizer
from layerlr.wrapped_checks import innermost

from .copies import distinct


class Trace:
    """Angles of layers at some steps; a sink of `AngularRates`, or what it wrote to a file.

    Attributes
    ----------
    steps : list of int
        Numbers of the steps, ascending.
    angles : list of dict of str to float
        Of each of them, radians by layer.

    Examples
    --------
    >>> trace = Trace()
    >>> with AngularRates(optimizer, trace):
    ...     train(model, optimizer)
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.angles: list[dict[str, float]] = []

    def __repr__(self) -> str:
        """Return the class with the number of steps."""
        return f"{type(self).__name__}({len(self.steps)} steps)"

    def __call__(self, step: int, table: Mapping[str, Any]) -> None:
        """Append a record: ``names`` and ``angle``."""
        self._append(step, zip(table["names"], table["angle"].tolist(), strict=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read the JSON lines that `AngularRates` or `Telemetry` has written.

        Where the steps begin again (a run that was resumed from a checkpoint, another run into the
        same file), the later lines replace what was recorded of these steps and the ones after.

        Raises
        ------
        ValueError
            For lines that are no record of an angle, with the number of the line.
        """
        trace = cls()
        rows: dict[int, dict[str, float]] = {}
        last = 0
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{path}, line {number} is no JSON: was it cut off?"
                    ) from error
                if not (isinstance(row, dict) and {"step", "layer", "angle"} <= row.keys()):
                    raise ValueError(f"{path}, line {number} has no step, layer or angle")
                step, layer, angle = row["step"], row["layer"], row["angle"]
                if not (isinstance(step, int) and isinstance(layer, str)):
                    raise ValueError(f"{path}, line {number}: step is no int, or layer no name")
                if not (angle is None or is_number(angle)):
                    raise ValueError(f"{path}, line {number}: angle {angle!r} is no number")
                if step < last or layer in rows.get(step, ()):
                    rows = {known: angles for known, angles in rows.items() if known < step}
                rows.setdefault(step, {})[layer] = math.nan if angle is None else angle
                last = step
        for step, angles in rows.items():
            trace._append(step, angles.items())
        return trace

    def at(self, step: int) -> dict[str, float]:
        """The angles of a step: those of the next record, after the last one those of the last.

        Raises
        ------
        ValueError
            Where nothing is recorded, and for angles that a rule cannot turn by.
        """
        if not self.steps:
            raise ValueError("the trace has no record: nothing to replay")
        place = min(bisect.bisect_left(self.steps, step), len(self.steps) - 1)
        for layer, angle in self.angles[place].items():
            if not 0.0 <= angle < math.pi / 2:
                raise ValueError(
                    f"layer {layer!r} turned by {angle} in step {self.steps[place]}: a step of lr "
                    "turns by less than pi/2"
                )
        return self.angles[place]

    def _append(self, step: int, angles: Iterable[tuple[str, float]]) -> None:
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step {step} comes after step {self.steps[-1]}")
        self.steps.append(step)
        self.angles.append(dict(angles))


class Replay(LRScheduler):
    """Set the lr of a rule to the tangent of recorded angles; see `replay`."""

    def __init__(
        self, trace: Trace, optimizer: LayerwiseOptimizer, per_layer: bool, last_epoch: int = -1
    ) -> None:
        self.trace, self.per_layer = trace, per_layer
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return the lr of each group; with ``per_layer`` the ``lr_factor`` is set as well."""
        angles = self.trace.at(self.last_epoch + 1)
        groups = self.optimizer.param_groups
        turned = [_turned(self.optimizer, index) for index in range(len(groups))]
        if not any(turned):
            raise ValueError("replay turns no layer: give rule='layca' or rule='hyperball'")
        named = iter(distinct(name for layers in turned for name, _ in layers))
        found, factors = [], []
        for group, own in zip(groups, turned, strict=True):
            layers = [(next(named), trains) for _, trains in own]
            missing = [name for name, trains in layers if trains and name not in angles]
            if missing:
                raise ValueError(
                    f"the trace does not know layer {missing[0]!r}: it has {', '.join(angles)}; "
                    "give both optimizers names (model.named_parameters(), or attach)"
                )
            known = [angles[name] for name, trains in layers if trains]
            if not known:
                found.append(group["lr"])
                continue
            mean = math.tan(sum(known) / len(known))
            rates = [math.tan(angles[name]) if trains else mean for name, trains in layers]
            found.append(mean)
            factors.append((group, [rate / mean if mean else 1.0 for rate in rates]))
        for group, factor in factors if self.per_layer else ():
            group["lr_factor"] = factor
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the trace, which stays out of it."""
        return {k: v for k, v in super().state_dict().items() if k not in ("trace", "per_layer")}


def replay(
    trace: Trace | str | os.PathLike[str],
    optimizer: LayerwiseOptimizer,
    *,
    per_layer: bool = True,
    last_epoch: int = -1,
) -> Replay:
    """Play recorded angles back: a learning-rate scheduler for an optimizer under Layca.

    ::

        lr = tan(mean angle of the group's layers);  lr_factor = tan(angle) / lr  of each layer

    Parameters
    ----------
    trace : Trace or path
        What `AngularRates` recorded, of layers of the same names. Steps between two records take
        the later one's angles, those after the last one the last's.
    optimizer
        Of this package (wrappers too), under Layca or Hyperball. Groups without a rule keep their
        lr; ``plain_lr`` and a wrapper's base follow the mean as they follow every lr.
    per_layer : bool
        False: every layer of a group turns by the mean, and ``lr_factor`` is left alone.
    last_epoch : int
        As torch's schedulers have it.

    Returns
    -------
    Replay
        A `torch.optim.lr_scheduler.LRScheduler`: call ``step()`` after each step.

    Raises
    ------
    TypeError, ValueError
        For an optimizer, a rule or a trace that does not fit, naming the layer.

    Notes
    -----
    Layca turns by the recorded angle to rounding. Hyperball does where its step is orthogonal to
    the weights, and by less where it is not.

    Rates that change layer by layer are handed to the engine anew at each step, which takes the
    host some time for each parameter; with ``per_layer=False`` there is nothing to hand over.

    References
    ----------
    Carbonnelle & De Vleeschouwer (arXiv:1806.01603) train Layca with rotations that other
    optimizers showed.
    """
    optimizer = innermost(optimizer)
    if not isinstance(optimizer, LayerwiseOptimizer):
        raise TypeError(
            f"replay wants an optimizer of layerlr, got {type(optimizer).__name__}: put a rule on "
            "it with layerlr.wrap(optimizer, 'layca', lr=...)"
        )
    trace = trace if isinstance(trace, Trace) else Trace.load(trace)
    return Replay(trace, optimizer, per_layer, last_epoch)


def _turned(optimizer: Any, index: int) -> list[tuple[str, bool]]:
    """The layers that a group's rule turns, in ``lr_factor``'s order: name, and if it trains."""
    tables = [of_table.table for of_table in optimizer.plans.fitting(index).tables]
    rule = optimizer.param_groups[index]["rule"]
    if rule is None:
        return []
    if rule.name not in ("layca", "hyperball") or not rule.sets_length:
        raise ValueError(f"lr is no angle under {rule!r}: replay is for Layca and Hyperball")
    found = [_ruled(table) for table in tables]
    if len([layers for layers in found if layers]) > 1:
        raise ValueError(
            f"param group {index} has layers on several devices: give each its own group"
        )
    return [layer for layers in found for layer in layers]


def _ruled(table: LayerTable) -> list[tuple[str, bool]]:
    trains = {span.layer for span in table.spans if table.params[span.tensor].requires_grad}
    layers = enumerate(zip(table.layers, table.ruled, strict=True))
    return [(name, k in trains) for k, (name, ruled) in layers if ruled]
