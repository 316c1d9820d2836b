"""Statistics of each layer's last step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import COLUMNS
from .plans import PlanCache

#: columns that say how a layer moved
_STEP = ("ww", "uu", "wu", "a", "b")


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


def rates(cache: PlanCache) -> dict[str, Any]:
    """``names``, and the last step's ``angle`` and ``relative``, its length over that of w."""
    names, column = _table(cache)
    ww, uu, wu, a, b = (column[c] for c in _STEP)
    c = a - 1.0
    moved = (c * c * ww + 2.0 * c * b * wu + b * b * uu).clamp(min=0.0)
    relative = torch.where(ww > 0, (moved / ww).sqrt(), 0.0)
    return {"names": names, "angle": angle(ww, uu, wu, a, b), "relative": relative}


def _table(cache: PlanCache) -> tuple[list[str], dict[str, Tensor]]:
    """The layers that are measured, and the columns of their statistics."""
    names: list[str] = []
    rows: list[Tensor] = []
    for plans in cache.every():
        if plans.group["rule"] is None and plans.group["on_nonfinite"] != "skip":
            continue  # nothing is measured
        for of_table in plans.tables:
            names += of_table.table.layers
            rows.append(of_table.stats)
    # not to the host, if there is a device: a copy there would have to be waited for
    device = next((r.device for r in rows if r.device.type != "cpu"), torch.device("cpu"))
    all_rows = (
        torch.cat([r.to(device, non_blocking=True) for r in rows])
        if rows
        else torch.zeros(0, len(COLUMNS), dtype=torch.float64)
    )
    return names, dict(zip(COLUMNS, all_rows.unbind(1), strict=True))


def angle(ww: Tensor, uu: Tensor, wu: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Angle between w and ``a*w + b*u``, from the sums over both; 0 where w is zero."""
    cross = (ww * uu - wu * wu).clamp(min=0.0).sqrt()
    return torch.where(ww > 0, torch.atan2(b.abs() * cross, a * ww + b * wu), 0.0)
