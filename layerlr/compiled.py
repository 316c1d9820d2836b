"""The step that ``torch.compile`` sees: one op, whose body is the eager step.

A compiler cannot look into native plans. It sees ``torch.ops.layerlr.step``, which reads and writes
the tensors that it is given. When the op runs, it finds the live optimizer by a handle and has it
step: so every engine and every option compiles, and lr, betas and the like are read at that moment
instead of being constants of the graph.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dtensor import is_sharded
from .plans import PlanCache

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer

_live: weakref.WeakValueDictionary[str, LayerwiseOptimizer] = weakref.WeakValueDictionary()
_handles = itertools.count()

_library = torch.library.Library("layerlr", "FRAGMENT")
_library.define(
    "step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor[] rates, "
    "Tensor? grad_scale, Tensor? found_inf, int[] places, int[] rated, str handle) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # captures must be noticed: layerlr/graphs.py
)


def handle_of(optimizer: LayerwiseOptimizer) -> str:
    """A name by which graphs find the optimizer, and which does not keep it alive.

    A number would be a symbol in the graph of the second optimizer that torch 2.11 compiles.
    """
    handle = str(next(_handles))
    _live[handle] = optimizer
    return handle


def step(optimizer: LayerwiseOptimizer) -> None:
    """Trace the step of an optimizer; DTensors and ``differentiable=True`` break the graph."""
    from torch._dynamo.comptime import comptime

    comptime(_see_changes)
    cache = optimizer.plans
    operands = _operands(cache)
    if optimizer.defaults["differentiable"] or any(is_sharded(p) for p, _ in operands):
        torch._dynamo.disable(optimizer.eager_step)()  # a graph break
        return
    places = [k for k, (p, _) in enumerate(operands) if p.grad is not None]
    params = [operands[k][0] for k in places]
    states = [operands[k][1] or {} for k in places]
    state = [x for values in states for x in values.values() if isinstance(x, Tensor)]
    rated = _tensor_rates(optimizer.handle)
    rates = [cache.groups[k].group["lr"].detach() for k in rated]
    with torch.no_grad():
        torch.ops.layerlr.step(
            params,
            [p.grad for p in params],
            state,
            rates,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            places,
            rated,
            optimizer.handle,
        )


def _operands(cache: PlanCache) -> list[tuple[Tensor, dict[str, Any] | None]]:
    """Every parameter that takes steps, and its state."""
    return [
        operand
        for plans in cache.groups
        for of_table in plans.tables
        for operand in zip(of_table.table.params, of_table.states, strict=True)
    ]


def _tensor_rates(handle: str) -> list[int]:
    """Groups whose lr is a tensor; asked without looking at a lr that is a number."""
    groups = _live[handle].param_groups
    return [k for k, group in enumerate(groups) if isinstance(group["lr"], Tensor)]


# torch.compiler.assume_constant_result, without its import of the whole compiler
_tensor_rates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _see_changes(ctx: Any) -> None:
    """While compiling: break the graph if it has changed a param group, which the op reads."""
    effects = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    optimizer = ctx.get_local("optimizer")._i_will_not_complain_if_bc_breaks_VariableTracker().value
    for group in optimizer.param_groups:
        seen = effects.id_to_variable.get(id(group))
        if seen is not None and effects.is_modified(seen):
            ctx.graph_break()


@torch.library.register_fake("layerlr::step")
def _(*_: Any) -> None:
    """Nothing is returned, nothing changes shape."""


@torch.library.impl(_library, "step", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _run(
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    rates: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    places: list[int],
    rated: list[int],
    handle: str,
) -> None:
    """Step the live optimizer with the values that are given.

    They are the optimizer's own tensors, or, where a compiler has made a step without side effects
    of it, copies; those go in before the step, and out after it.
    """
    optimizer = _live[handle]
    operands = _operands(optimizer.plans)
    own = [operands[k][0] for k in places]
    states = [operands[k][1] or {} for k in places]
    owned = [*own, *[x for values in states for x in values.values() if isinstance(x, Tensor)]]
    copies = [
        (x, y)
        for x, y in zip(owned, [*params, *state], strict=True)
        if x is not y and x.data_ptr() != y.data_ptr()
    ]
    for x, y in copies:
        x.detach().copy_(y)
    with contextlib.ExitStack() as back:
        for p, grad in zip(own, grads, strict=True):
            if p.grad is not grad:
                back.callback(setattr, p, "grad", p.grad)
                p.grad = grad
        for k, lr in zip(rated, rates, strict=True):  # of other groups it is read as it is now
            group = optimizer.plans.groups[k].group
            back.callback(group.__setitem__, "lr", group["lr"])
            group["lr"] = lr
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if value is not None:
                back.callback(setattr, optimizer, name, getattr(optimizer, name, None))
                setattr(optimizer, name, value)
        optimizer.eager_step()
    for x, y in copies:
        y.copy_(x.detach())
