"""The C++ engine: one cached plan, one call a step."""

from __future__ import annotations

import torch

from layerlr import _C
from layerlr.ops import step_

from . import native
from .base import Hyper, PlanSpec


class CpuBackend:
    """float32, float64, bfloat16, float16 and complex parameters in memory of the host."""

    name = "cpu"

    def unsupported(self, spec: PlanSpec) -> str | None:
        """Why a case must go elsewhere."""
        if spec.table.device.type != "cpu":
            return f"does not support parameters on {spec.table.device}"
        return native.unsupported(spec)

    def plan(self, spec: PlanSpec) -> CpuPlan:
        """Plan for a supported case."""
        return CpuPlan(spec)


class CpuPlan:
    """A native plan over the live parameters and state dicts of a table."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self._native = _C.CpuPlan(native.live_plan(spec))

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh."""
        return native.prepare(self._native, self.spec, "cpu")

    def step(self, h: Hyper) -> None:
        """One pass, or two where there is something to measure."""
        if not float(h.found_inf):
            numbers = float(h.lr), h.weight_decay, h.decoupled, float(h.sign)
            self._native.step(*numbers, h.skip, h.direction)

    def traced_step(self, h: Hyper) -> None:
        """The same step under ``torch.compile``; outside the graph where there is a precision."""
        if self.spec.precision is None:
            step_(self.spec, h)
        else:
            self._outside(h)

    @torch._disable_dynamo
    def _outside(self, h: Hyper) -> None:
        if not self.prepare():
            raise RuntimeError("optimizer.state changed since the last step outside torch.compile")
        self.step(h)
