"""The C++ engine: one cached plan, one call a step."""

from __future__ import annotations

import torch

from layerlr import _C
from layerlr.ops import step_

from .base import Hyper, PlanSpec, accumulator, check_gradient, state_dtype

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


class CpuBackend:
    """float32, float64, bfloat16, float16 and complex parameters in memory of the host."""

    name = "cpu"

    def unsupported(self, spec: PlanSpec) -> str | None:
        """Why a case must go elsewhere."""
        if spec.differentiable:
            return "does not support differentiable=True"
        if spec.direction.name not in _C.directions():
            return f"has no direction {spec.direction.name!r}"
        if spec.rule is not None and spec.rule.name not in _C.rules():
            return f"has no rule {spec.rule.name!r}"
        if spec.table.device.type != "cpu":
            return f"does not support parameters on {spec.table.device}"
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

    def plan(self, spec: PlanSpec) -> CpuPlan:
        """Plan for a supported case."""
        return CpuPlan(spec)


class CpuPlan:
    """A native plan over the live parameters and state dicts of a table."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        table, rule = spec.table, spec.rule
        self._native = _C.Plan(
            table.params,
            spec.states,
            list(spec.direction.states),
            table.spans,
            table.ruled,
            table.lr_scale,
            spec.direction.name,
            None if rule is None else rule.name,
            () if rule is None else rule.hyper(),
            spec.stats,
        )

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh."""
        answer = self._native.prepare()
        if answer >= 0:
            p, name = self.spec.table.params[answer], self.spec.table.names[answer]
            assert p.grad is not None
            check_gradient(name, p, p.grad)
            raise RuntimeError(
                f"backend 'cpu' wants gradients in the parameter's dtype; {name!r} is {p.dtype}, "
                f"its gradient {p.grad.dtype}: use backend='reference'"
            )
        return bool(answer == _C.Plan.READY)

    def step(self, h: Hyper) -> None:
        """One pass, or two where there is something to measure."""
        self._native.step(float(h.lr), h.weight_decay, h.decoupled, h.maximize, h.skip, h.direction)

    def traced_step(self, h: Hyper) -> None:
        """The same step under ``torch.compile``."""
        step_(self.spec, h)
