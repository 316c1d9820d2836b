"""The C++ engine: one cached plan, one call a step."""

from __future__ import annotations

import torch

from layerlr import _C

from . import native
from .base import PlanSpec


class CpuBackend:
    """float32, float64, bfloat16, float16 and complex parameters in memory of the host."""

    name = "cpu"

    def missing(self, device: torch.device) -> str | None:
        """Why a device has no such engine."""
        return None if device.type == "cpu" else f"does not support parameters on {device}"

    def unsupported(self, spec: PlanSpec) -> str | None:
        """Why a case must go elsewhere."""
        return self.missing(spec.table.device) or native.unsupported(spec)

    def plan(self, spec: PlanSpec) -> CpuPlan:
        """Plan for a supported case."""
        return CpuPlan(spec)


class CpuPlan(native.NativePlan):
    """A native plan over the live parameters and state dicts of a table."""

    name = CpuBackend.name

    def __init__(self, spec: PlanSpec) -> None:
        super().__init__(spec, _C.CpuPlan(native.bound(spec)))
