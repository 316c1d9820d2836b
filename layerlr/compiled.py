"""``torch.ops.layerlr.step_``, the step that ``torch.compile`` sees.

Eager steps go through a cached native plan, which a compiler cannot look into; the registered op
does the same from plain tensors. What is a Python number to the compiler is a constant of its
graph, compiled again when it changes; so a second op, ``numbers``, asks the live optimizer for lr,
weight decay and the like when the graph runs.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the op)
from .backends.base import PlanSpec

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer

_live: weakref.WeakValueDictionary[int, LayerwiseOptimizer] = weakref.WeakValueDictionary()
_handles = itertools.count()
#: columns of `numbers`
WIDTH = 10


def handle_of(optimizer: LayerwiseOptimizer) -> int:
    """A number by which graphs find the optimizer, and which does not keep it alive."""
    handle = next(_handles)
    _live[handle] = optimizer
    return handle


@torch.library.impl("layerlr::numbers", "CompositeExplicitAutograd")
def _numbers(handle: int) -> Tensor:
    rows = _live[handle]._numbers()
    padded = [[*row, *(WIDTH - len(row)) * (0.0,)] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


@torch.library.register_fake("layerlr::numbers")
def _(handle: int) -> Tensor:
    return torch.empty(len(_live[handle]._plans), WIDTH, dtype=torch.float64)


def has_tensor_lr(handle: int, index: int) -> bool:
    """Whether a group's lr is a tensor; asked without looking at a lr that is a number."""
    return isinstance(_live[handle].param_groups[index]["lr"], Tensor)


# torch.compiler.assume_constant_result, without its import of the whole compiler
has_tensor_lr._dynamo_marked_constant = True  # type: ignore[attr-defined]


def see_changes(ctx: Any) -> None:
    """While compiling: break the graph if it has changed a param group, which `numbers` reads."""
    effects = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    optimizer = ctx.get_local("self")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    for group in optimizer.param_groups:
        seen = effects.id_to_variable.get(id(group))
        if seen is not None and effects.is_modified(seen):
            ctx.graph_break()


@torch.library.register_fake("layerlr::step_")
def _(params: list[Tensor], *_: Any) -> None:
    """Nothing is returned, nothing changes shape."""


def step_(
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
        [] if rule is None else list(rule.hyper()),
    )
