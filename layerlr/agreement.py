"""Whether an engine takes the steps of the reference, in units in the last place.

::

    unit of x  = eps * 2^floor(log2 |x|)       eps: of the weights' dtype
    difference = max |w_engine - w_reference| / unit of max(|w before|, |w_reference|)

Without a rule it is 0. With one, sums that are added in another order differ in their last float64
bits, so weights may by 2 units, of the larger weight, as a step may cancel most of it. float64 is
its own last bits: 16 (8 were seen, on a layer of a million elements).
"""

from __future__ import annotations

import torch
from torch import Tensor

ULPS = 2
ULPS_FLOAT64 = 16


def bound(ruled: bool, dtype: torch.dtype) -> int:
    """By how many units in the last place a weight may differ."""
    if not ruled:
        return 0
    return ULPS_FLOAT64 if dtype == torch.float64 else ULPS


def worst(before: Tensor, a: Tensor, b: Tensor) -> float:
    """Largest difference of a and b in units in the last place; infinite beside a NaN."""
    if not a.numel() or torch.equal(a, b):
        return 0.0
    finfo = torch.finfo(a.dtype)
    size = torch.maximum(before.double().abs(), b.double().abs()).clamp(min=finfo.smallest_normal)
    unit = torch.ldexp(torch.full_like(size, finfo.eps), torch.frexp(size).exponent - 1)
    off = (a.double() - b.double()).abs() / unit
    return float(off.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def difference(mine: torch.optim.Optimizer, other: torch.optim.Optimizer, steps: int) -> float:
    """Largest difference in some steps of two optimizers, ``other``'s being the reference's.

    Both have the same parameters, with gradients, ``other`` on the CPU. After each step it goes on
    from the weights and state of ``mine``, whatever they are.
    """
    ours, theirs = ([p for g in o.param_groups for p in g["params"]] for o in (mine, other))
    most = 0.0
    for _ in range(steps):
        before = [q.detach().clone() for q in theirs]
        mine.step()
        other.step()
        for w, p, q in zip(before, ours, theirs, strict=True):
            found = p.detach().to(q.device)
            most = max(most, worst(w, found, q.detach()))
            q.detach().copy_(found)
            for key, value in mine.state[p].items():
                if isinstance(value, Tensor):
                    other.state[q][key].copy_(value)
    return most
