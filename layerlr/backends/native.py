"""What the native engines share: the cases they run, and the look-up of a step's operands."""

from __future__ import annotations

import torch

from layerlr import _C
from layerlr.precision import KEYS

from .base import PlanSpec, accumulator, check_gradient, state_dtype

_DTYPES = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
    }
)


def unsupported(spec: PlanSpec) -> str | None:
    """Why no native engine can run a case, or None."""
    if spec.differentiable:
        return "does not support differentiable=True"
    if spec.direction.name not in _C.directions():
        return f"has no direction {spec.direction.name!r}"
    if spec.rule is not None and spec.rule.kernel not in _C.rules():
        return f"has no rule {spec.rule.kernel!r}"
    for p, name, state in zip(spec.table.params, spec.table.names, spec.states, strict=True):
        if p.dtype not in _DTYPES:
            return f"does not support parameter {name!r} of dtype {p.dtype}"
        for key in spec.direction.states if state else ():
            dtype = state[key].dtype  # type: ignore[index]
            if dtype != state_dtype(p):
                return f"keeps state in {accumulator(p.dtype)}, {name!r} has {key} in {dtype}"
        if state and state["step"].dtype not in (torch.float32, torch.float64):
            return f"counts steps in floating point, {name!r} in {state['step'].dtype}"
    return None


def counts_elsewhere(spec: PlanSpec, device: torch.device) -> str | None:
    """Why an engine that counts steps on the device cannot, or None."""
    for name, state in zip(spec.table.names, spec.states, strict=True):
        if state and state["step"].device != device:
            return f"counts steps on {device}, {name!r} on {state['step'].device}"
    return None


def live_plan(spec: PlanSpec) -> _C.LivePlan:
    """The native look-up over the live parameters and state dicts of a table."""
    table, rule = spec.table, spec.rule
    return _C.LivePlan(
        table.params,
        spec.states,
        list(spec.direction.states),
        table.spans,
        table.ruled,
        table.lr_scale,
        table.start_radius,
        spec.direction.name,
        None if rule is None else rule.kernel,
        None if rule is None else rule.memory_key,
        spec.stats,
        spec.precision or "",
        KEYS.get(spec.precision or "", ""),
    )


def prepare(plan: _C.LivePlan, spec: PlanSpec, backend: str) -> bool:
    """Read gradients and data pointers afresh; False: the plan is out of date."""
    answer = plan.prepare()
    if answer >= 0:
        p, name = spec.table.params[answer], spec.table.names[answer]
        assert p.grad is not None
        check_gradient(name, p, p.grad)
        raise RuntimeError(
            f"backend {backend!r} wants gradients in the parameter's dtype; {name!r} is {p.dtype}, "
            f"its gradient {p.grad.dtype}: use backend='reference'"
        )
    return bool(answer == _C.LivePlan.READY)
