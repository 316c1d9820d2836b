"""Gradient rules on another optimizer: its gradients for a step are ``f*g``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import devices, dtensor
from .backends import COLUMNS, Plan, StepConfig
from .group_plans import GroupPlans
from .rules import LayerStats
from .sharded_plan import ShardedPlan, measure

#: the first columns: ww gg uu wu scale lr
_KNOWN = COLUMNS.index("lr") + 1


@contextmanager
def scaled_gradients(
    groups: Sequence[GroupPlans], numbers: Callable[[dict[str, Any]], StepConfig]
) -> Iterator[None]:
    """Within, ``.grad`` of governed parameters is the rule's factor times what it was.

    ``groups``: plans that have read their gradients.
    """
    plans = [(plan, group.group) for group in groups for plan in group.plans]
    sums = measure([(plan, numbers(group)) for plan, group in plans])
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for (plan, group), of_layers in zip(plans, sums, strict=True):
            factor = _factors(plan, group, of_layers)
            table, values = plan.spec.table, factor
            if isinstance(plan, ShardedPlan):
                table, values = plan.layout.table, factor[plan.layout.layer_of]
            for i, p in enumerate(plan.spec.table.params):
                if p.grad is None:
                    continue
                own.append((p, p.grad))
                g = dtensor.local_gradient(p)
                assert g is not None
                wide = g.to(torch.promote_types(g.dtype, torch.float32))
                scaled = (wide * table.spread(i, values, wide)).to(g.dtype)  # rounded once
                p.grad = dtensor.like(p, scaled)
        yield
    finally:
        for p, g in own:
            p.grad = g


def _factors(plan: Plan, group: dict[str, Any], sums: Tensor) -> Tensor:
    """The factor of each layer, which goes into the statistics too; the step is not measured."""
    rule, stats = plan.spec.rule, plan.spec.stats
    assert rule is not None
    found = LayerStats(*sums[:, :4].unbind(1))
    lr = devices.scalar(group["lr"], stats.device).expand_as(found.gg)  # a base has one for all
    factor = rule.factor(found, lr, 0.0)  # the base's decay is none of the gradient
    unknown = torch.full_like(factor, torch.nan)
    rows = torch.stack([found.ww, found.gg, unknown, unknown, factor, lr * factor], 1)
    stats[:, :_KNOWN] = rows
    return factor
