"""One step over the plans of all param groups: the algorithm, whatever engine runs the plans.

::

    n = norm of the gradients that are clipped       reduced over processes
    g <- min(1, max_grad_norm / n) * g
    sums of each layer <- first pass                 reduced over processes
    weights, state <- second pass, with the scale that the rule finds from the sums

A plan whose layers lie in one process does both passes in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import devices
from .backends import Plan, StepConfig
from .backends.config import GRAD_FACTOR
from .sharded_plan import ShardedPlan, reduce

#: a plan that has read its gradients, and the numbers to step it with
Step: TypeAlias = tuple[Plan, StepConfig]


def step(steps: Sequence[Step], bounds: Mapping[int, float]) -> Tensor | None:
    """Step all plans; ``bounds``: number of a plan -> ``max_grad_norm``, where its group has one.

    Returns the norm of the gradients that were clipped, a float64 scalar on the first one's device;
    None where no group has a bound.
    """
    norm = None
    if bounds:
        steps, norm = clip(steps, bounds)
    halved = []
    for plan, config in steps:
        if isinstance(plan, ShardedPlan) and plan.measures(config):
            halved.append((plan, config, plan.measure(config)))
        else:
            if plan.spec.table.again:  # what it has read was written since
                plan.prepare()
            plan.step(config)
    if halved:
        reduce([(plan, sums) for plan, _, sums in halved])
    for plan, config, sums in halved:
        plan.apply(config, sums)
    return norm


def clip(steps: Sequence[Step], bounds: Mapping[int, float]) -> tuple[list[Step], Tensor]:
    """Put ``min(1, bound / (n + 1e-6))`` on the gradients of the plans that have a bound.

    n, which is returned with the steps, is the norm of all gradients of these plans. Layers that
    will be skipped count nothing.
    """
    clipped = list(steps)
    factors: dict[int, Tensor] = {}
    for k in bounds:  # on the device, as the step's will be: a graph reads one or the other
        plan, config = steps[k]
        factors[k] = devices.scalar(config.get(GRAD_FACTOR), plan.spec.table.device)
        clipped[k] = plan, config.replaced(GRAD_FACTOR, factors[k])
    squares = [plan.norms(config) for plan, config in (clipped[k] for k in bounds)]
    shared = zip((clipped[k][0] for k in bounds), squares, strict=True)
    reduce([(plan, x[:, None]) for plan, x in shared if isinstance(plan, ShardedPlan)])
    total = torch.zeros((), dtype=torch.float64, device=squares[0].device)
    for k, of_layers in zip(bounds, squares, strict=True):
        if steps[k][1].skips:
            of_layers = torch.where(torch.isfinite(of_layers), of_layers, 0.0)
        total += of_layers.sum().to(total.device)
    norm = total.sqrt()
    for k, bound in bounds.items():
        plan, config = clipped[k]
        factor = (bound / (norm + 1e-6)).clamp(max=1.0).to(factors[k].device)
        clipped[k] = plan, config.replaced(GRAD_FACTOR, factors[k] * factor)
    return clipped, norm
