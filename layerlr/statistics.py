"""Statistics of each layer's last step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import devices
from .backends import COLUMNS
from .group_plans import TablePlan
from .plans import PlanCache
from .rules import LayerRule

#: columns that say how a layer moved
_STEP = ("ww", "uu", "wu", "a", "b")


@torch._disable_dynamo
def layer_stats(cache: PlanCache) -> dict[str, Any]:
    """Statistics of the layers of all groups; see `LayerwiseOptimizer.layer_stats`."""
    names, column = _table(cache)
    shown = {c: column[c].clone() for c in ("ww", "gg", "uu", "wu", "scale", "lr")}
    return {
        "names": names,
        **shown,
        "angle": angle(*(column[c] for c in _STEP)),
        "skipped": column["skipped"].long(),
    }


def rates(cache: PlanCache, before: Tensor | None) -> dict[str, Any]:
    """``names``, and the last step's ``angle`` and ``relative``, its length over that of w.

    ``before``: `progress` before the step; layers that have made none since are at 0, as their
    numbers are those of an earlier step.
    """
    names, column = _table(cache)
    ww, uu, wu, a, b = (column[c] for c in _STEP)
    c = a - 1.0
    square = (c * c * ww + 2.0 * c * b * wu + b * b * uu).clamp(min=0.0)
    found = {
        "angle": angle(ww, uu, wu, a, b),
        "relative": torch.where(ww > 0, (square / ww).sqrt(), 0.0),
    }
    if before is not None and len(before) == len(names):
        taken, skipped = (progress(cache) > before).unbind(1)
        moved = taken & ~skipped
        found = {key: torch.where(moved, value, 0.0) for key, value in found.items()}
    return {"names": names, **found}


def progress(cache: PlanCache) -> Tensor:
    """For each layer of `layer_stats` the steps that its tensors have counted, and its skips.

    [layers, 2]. A step that moves a layer counts in the first alone. Nothing waits for the device.
    """
    rows = []
    for _, of_table in _measured(cache):
        stats, skipped = of_table.stats, of_table.stats[:, COLUMNS.index("skipped")]
        taken = stats.new_zeros(len(stats))
        counts = [(of_table.states[s.tensor], s.layer) for s in of_table.table.spans]
        counted = [(state["step"].view(1), layer) for state, layer in counts if state is not None]
        if counted:
            steps = torch.cat([step for step, _ in counted]).to(stats)
            layers = torch.tensor([layer for _, layer in counted])
            layers = layers.to(stats.device, non_blocking=True)
            taken = taken.scatter_add(0, layers, steps)
        rows.append(torch.stack([taken, skipped], 1))
    return _together(rows or [torch.zeros(0, 2, dtype=torch.float64)])


def growing(cache: PlanCache) -> Tensor | None:
    """The radius that each layer of `layer_stats` grows to, as `grows_to` has it.

    None where no rule has a radius. Nothing waits for the device.
    """
    measured = _measured(cache)
    if not any(rule is not None and rule.latches for rule, _ in measured):
        return None
    return _together([grows_to(rule, of_table) for rule, of_table in measured])


def grows_to(rule: LayerRule | None, plans: TablePlan) -> Tensor:
    """The radius that each layer of a table grows to by plain steps; 0: it does not grow."""
    zero = plans.stats.new_zeros(1)
    memory = [zero] * len(plans.table.layers)
    if rule is not None and rule.latches:
        for layer, i, k in plans.table.leaders(plans.states):
            of_parts = (plans.states[i] or {}).get(str(rule.memory_key))
            if of_parts is not None:
                memory[layer] = of_parts[k : k + 1] if len(of_parts) > 1 else of_parts
    now = torch.cat(memory)
    return torch.where(now < 0, -now, 0.0)


def _table(cache: PlanCache) -> tuple[list[str], dict[str, Tensor]]:
    """The layers that are measured, and the columns of their statistics."""
    measured = [of_table for _, of_table in _measured(cache)]
    names = [name for of_table in measured for name in of_table.table.layers]
    empty = torch.zeros(0, len(COLUMNS), dtype=torch.float64)
    rows = _together([of_table.stats for of_table in measured] or [empty])
    return names, dict(zip(COLUMNS, rows.unbind(1), strict=True))


def _measured(cache: PlanCache) -> list[tuple[LayerRule | None, TablePlan]]:
    """The tables that are measured, each with its group's rule."""
    return [
        (plans.group["rule"], of_table)
        for plans in cache.every()
        if plans.group["rule"] is not None or plans.group["on_nonfinite"] == "skip"
        for of_table in plans.tables
    ]


def _together(rows: list[Tensor]) -> Tensor:
    """Rows of several tables as one tensor."""
    # not to the host, if there is a device: a copy there would have to be waited for
    device = devices.home([r.device for r in rows])
    return torch.cat([r.to(device, non_blocking=True) for r in rows])


def angle(ww: Tensor, uu: Tensor, wu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Angle between w and ``a*w + b*u``, from the sums over both; 0 where w is zero."""
    cross = (ww * uu - wu * wu).clamp(min=0.0).sqrt()
    return torch.where(ww > 0, torch.atan2(b.abs() * cross, a * ww + b * wu), 0.0)
