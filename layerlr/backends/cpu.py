"""The C++ engine: one cached plan, one call a step."""

from __future__ import annotations

from torch import Tensor

from layerlr import _C

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
        self.traceable = spec.precision is None  # the op knows weights that are held as they are
        self._native = _C.CpuPlan(native.live_plan(spec))

    def prepare(self) -> bool:
        """Read gradients and data pointers afresh."""
        return native.prepare(self._native, self.spec, "cpu")

    def step(self, h: Hyper) -> None:
        """One pass, or two where there is something to measure."""
        if not float(h.found_inf):
            self._native.step(*_numbers(h))

    def norms(self, h: Hyper) -> Tensor:
        """One pass over the gradients."""
        return self._native.norms(*_numbers(h))

    def measure(self, h: Hyper) -> Tensor:
        """The first pass."""
        if float(h.found_inf):
            return self.spec.stats.new_zeros(len(self.spec.table.layers), 4)
        return self._native.measure(*_numbers(h))

    def apply(self, h: Hyper, sums: Tensor) -> None:
        """The second pass."""
        if not float(h.found_inf):
            self._native.apply(*_numbers(h), sums)

    def refresh(self, h: Hyper) -> None:
        """Nothing is captured here."""


def _numbers(h: Hyper) -> tuple[float, float, bool, float, bool, tuple[float, ...]]:
    return float(h.lr), h.weight_decay, h.decoupled, float(h.sign), h.skip, h.direction
