"""What the native engines share: the cases they run, and the look-up of a step's operands."""

from __future__ import annotations

from array import array
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerlr import _C, codes
from layerlr.precision import KEYS

from .base import PlanSpec, accumulator, check_tensors, state_dtype
from .config import StepConfig

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
            if dtype != state_dtype(p) and not codes.is_coded_of(p, state[key]):  # type: ignore[index]
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


def bound(spec: PlanSpec) -> _C.PlanSpec:
    """What a native plan over the live parameters and state dicts of a table is built from."""
    table, rule, native = spec.table, spec.rule, _C.PlanSpec()
    native.params, native.states = table.params, spec.states
    native.keys = list(spec.direction.states)
    native.aux_keys = [codes.scale_key(key) for key in native.keys]
    native.precision = spec.precision or ""
    native.weights_aux_key = KEYS.get(native.precision, "")
    native.spans = table.spans
    native.ruled, native.lr_scale = table.ruled, table.lr_scale
    native.start_radius = table.start_radius
    native.direction = spec.direction.name
    native.rule = None if rule is None else rule.kernel
    native.memory_key = None if rule is None else rule.memory_key
    native.stats = spec.stats
    return native


def prepare(plan: _C.BoundPlan, spec: PlanSpec, backend: str) -> bool:
    """Read gradients and data pointers afresh; False: the plan is out of date."""
    answer = plan.prepare()
    if answer >= 0:
        p, name = spec.table.params[answer], spec.table.names[answer]
        assert p.grad is not None
        check_tensors(name, p, p.grad, spec.states[answer])
        raise RuntimeError(
            f"backend {backend!r} wants gradients in the parameter's dtype; {name!r} is {p.dtype}, "
            f"its gradient {p.grad.dtype}: use backend='reference'"
        )
    return bool(answer == _C.BoundPlan.READY)


class NativePlan:
    """A plan that C++ holds; `numbers` is what its methods take of a step's config."""

    name: ClassVar[str]

    def __init__(self, spec: PlanSpec, native: Any) -> None:
        self.spec, self._native = spec, native

    def numbers(self, config: StepConfig) -> tuple[array[float], ...]:
        """All of them on the host."""
        return (config.on_host(),)

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh; nothing reaches a device yet."""
        return prepare(self._native, self.spec, self.name)

    def step(self, config: StepConfig) -> None:
        """One pass, or two where there is something to measure."""
        if not config.changes_nothing:
            self._native.step(*self.numbers(config))

    def norms(self, config: StepConfig) -> Tensor:
        """One pass over the gradients."""
        norms: Tensor = self._native.norms(*self.numbers(config))
        return norms

    def measure(self, config: StepConfig) -> Tensor:
        """The first pass."""
        sums: Tensor = self._native.measure(*self.numbers(config))
        return sums

    def apply(self, config: StepConfig, sums: Tensor) -> None:
        """The second pass."""
        if not config.changes_nothing:
            self._native.apply(*self.numbers(config), sums)

    def forget(self) -> None:
        """Let go of the gradients, and of copies of what lies otherwise than the plan."""
        self._native.forget()

    def refresh(self, config: StepConfig) -> None:
        """Nothing is captured on the host."""
