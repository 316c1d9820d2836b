"""The step that ``torch.compile`` sees: the op ``torch.ops.layerlr.step_``, or a graph break.

Eager steps go through a cached native plan, which a compiler cannot look into; the registered op
does the same from plain tensors. What is a Python number to the compiler is a constant of its
graph, compiled again when it changes; so a second op, ``numbers``, asks the live optimizer for lr,
weight decay and the like when the graph runs.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C
from .backends import PlanSpec
from .backends.config import FOUND_INF, GRAD_FACTOR
from .plans import GroupPlans, group_key

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer

_live: weakref.WeakValueDictionary[int, LayerwiseOptimizer] = weakref.WeakValueDictionary()
_handles = itertools.count()


def handle_of(optimizer: LayerwiseOptimizer) -> int:
    """A number by which graphs find the optimizer, and which does not keep it alive."""
    handle = next(_handles)
    _live[handle] = optimizer
    return handle


def step(optimizer: LayerwiseOptimizer, eager: Callable[[], None]) -> None:
    """Trace the step of an optimizer; ``eager``, where there is no op for it, breaks the graph."""
    from torch._dynamo.comptime import comptime

    comptime(_see_changes)
    cache = optimizer.plans
    for index, plans in enumerate(cache.groups):
        if not _fits(optimizer, plans):
            torch._dynamo.disable(cache.fitting)(index)  # a graph break
    groups = cache.groups
    if not all(
        plans.group["max_grad_norm"] is None and all(plan.traceable for plan in plans.plans)
        for plans in groups
    ):
        torch._dynamo.disable(eager)()  # a graph break
        return
    # here, since it may raise: a graph would leave torch.no_grad() behind
    numbers = torch.ops.layerlr.numbers(optimizer.handle)
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    with torch.no_grad():
        for index, plans in enumerate(groups):
            tensor = _has_tensor_lr(optimizer.handle, index)
            lr = plans.group["lr"].detach() if tensor else None
            for plan in plans.plans:
                _step_table(plan.spec, numbers[index], lr, scale, found_inf)


def _fits(optimizer: LayerwiseOptimizer, plans: GroupPlans) -> bool:
    """`GroupPlans.fits`, as a compiler can trace it."""
    group = plans.group
    if any("momentum_buffer" in plan.spec.direction.states for plan in plans.plans):
        # a momentum that is not 0 is a number like others, and not looked at
        group = {**group, "momentum": 1.0}
    params = group["params"]
    same = len(params) == len(plans.params) and all(map(operator.is_, params, plans.params))
    return same and group_key(optimizer, group) == plans.key


def _numbers_of(optimizer: LayerwiseOptimizer) -> list[array[float]]:
    """What a compiled step of each group reads when it runs."""
    cache = optimizer.plans
    for index in cache.unfit():
        raise RuntimeError(
            f"param group {index} wants another step than was compiled, since its parameters or "
            "their state changed, or its momentum became 0: take a step outside torch.compile first"
        )
    rows = []
    for plans in cache:
        config = cache.config(plans)
        # grad_scale and found_inf are tensors of the graph
        config.put(GRAD_FACTOR, -1.0 if plans.group["maximize"] else 1.0)
        config.put(FOUND_INF, 0.0)
        rows.append(config.on_host())
    return rows


@torch.library.impl("layerlr::numbers", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _numbers(handle: int) -> Tensor:
    return torch.tensor(_numbers_of(_live[handle]), dtype=torch.float64)


@torch.library.register_fake("layerlr::numbers")
def _(handle: int) -> Tensor:
    return torch.empty(len(_live[handle].plans.groups), _C.CONFIG["size"], dtype=torch.float64)


def _has_tensor_lr(handle: int, index: int) -> bool:
    """Whether a group's lr is a tensor; asked without looking at a lr that is a number."""
    return isinstance(_live[handle].param_groups[index]["lr"], Tensor)


# torch.compiler.assume_constant_result, without its import of the whole compiler
_has_tensor_lr._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _see_changes(ctx: Any) -> None:
    """While compiling: break the graph if it has changed a param group, which `numbers` reads."""
    effects = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    optimizer = ctx.get_local("optimizer")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    for group in optimizer.param_groups:
        seen = effects.id_to_variable.get(id(group))
        if seen is not None and effects.is_modified(seen):
            ctx.graph_break()


@torch.library.register_fake("layerlr::step_")
def _(params: list[Tensor], *_: Any) -> None:
    """Nothing is returned, nothing changes shape."""


def _step_table(
    spec: PlanSpec,
    numbers: Tensor,
    lr: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Step the parameters of a table that have a gradient."""
    table, rule, direction = spec.table, spec.rule, spec.direction
    active = [i for i, p in enumerate(table.params) if p.grad is not None]
    place = {tensor: k for k, tensor in enumerate(active)}
    states: list[dict[str, Any]] = [spec.states[i] for i in active]  # type: ignore[misc]
    spans: list[int] = []
    leaders: list[int] = []
    kept: list[Tensor] = []
    key = None if rule is None else rule.kept
    absent = {s.layer for s in table.spans if s.tensor not in place}
    led: set[int] = set()
    parts: dict[int, int] = {}
    for span in table.spans:
        part = parts.get(span.tensor, 0)
        parts[span.tensor] = part + 1
        stored = (spec.states[span.tensor] or {}).get(key) if key else None
        if stored is not None and span.layer not in led:
            led.add(span.layer)
            if span.layer not in absent or not (rule and rule.latches):
                leaders += [span.layer, len(kept), part]
                kept.append(stored)
        if span.tensor in place:
            spans += [place[span.tensor], span.begin, span.end, span.layer]
    torch.ops.layerlr.step_(
        [table.params[i] for i in active],
        [table.params[i].grad for i in active],
        [state[k] for state in states for k in direction.states],
        [state["step"] for state in states],
        kept,
        spec.stats,
        numbers,
        lr,
        grad_scale,
        found_inf,
        direction.name,
        "" if rule is None else rule.kernel,
        spans,
        [int(r) for r in table.ruled],
        leaders,
        table.lr_scale,
    )
