"""The C++ engine: one cached plan, one call a step."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlr import _C

from . import native
from .base import PlanSpec
from .config import StepConfig


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


class CpuPlan:
    """A native plan over the live parameters and state dicts of a table."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec
        self._native = _C.CpuPlan(native.live_plan(spec))

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh."""
        return native.prepare(self._native, self.spec, "cpu")

    def step(self, config: StepConfig) -> None:
        """One pass, or two where there is something to measure."""
        self._native.step(config.on_host())

    def norms(self, config: StepConfig) -> Tensor:
        """One pass over the gradients."""
        return self._native.norms(config.on_host())

    def measure(self, config: StepConfig) -> Tensor:
        """The first pass."""
        return self._native.measure(config.on_host())

    def apply(self, config: StepConfig, sums: Tensor) -> None:
        """The second pass."""
        self._native.apply(config.on_host(), sums)

    def refresh(self, config: StepConfig) -> None:
        """Nothing is captured here."""
