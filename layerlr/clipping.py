"""``max_grad_norm``: gradients are clipped inside the step, all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import sharding
from .backends import Hyper, Plan


def clip(
    steps: Sequence[tuple[Plan, Hyper]], bounds: Mapping[int, float]
) -> tuple[list[tuple[Plan, Hyper]], Tensor | None]:
    """Put ``min(1, bound / (n + 1e-6))`` on the gradients of the steps that have a bound.

    n, which is returned with the steps, is the norm of all gradients of these, a float64 scalar on
    the first one's device; None where there is no bound. Layers that will be skipped count nothing.
    """
    clipped = list(steps)
    if not bounds:
        return clipped, None
    signs: dict[int, Tensor] = {}
    for k in bounds:  # on the device, as the step's will be: a graph reads one or the other
        plan, hyper = steps[k]
        sign = hyper.sign
        if not isinstance(sign, Tensor):
            sign = torch.full((), sign, dtype=torch.float64, device=plan.spec.table.device)
        signs[k] = sign
        clipped[k] = plan, hyper._replace(sign=sign)
    squares = sharding.norms([clipped[k] for k in bounds])
    total = torch.zeros((), dtype=torch.float64, device=squares[0].device)
    for k, of_layers in zip(bounds, squares, strict=True):
        if steps[k][1].skip:
            of_layers = torch.where(torch.isfinite(of_layers), of_layers, 0.0)
        total += of_layers.sum().to(total.device)
    norm = total.sqrt()
    for k, bound in bounds.items():
        plan, hyper = clipped[k]
        factor = (bound / (norm + 1e-6)).clamp(max=1.0).to(signs[k].device)
        clipped[k] = plan, hyper._replace(sign=signs[k] * factor)
    return clipped, norm
