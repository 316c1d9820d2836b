"""The CUDA engine: the whole step in one launch on the current stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerlr import _C, devices

from . import native
from .base import PlanSpec
from .config import StepConfig

#: beside layerlr._C, and as good for any other Python and torch (docs/wheels.md)
LIBRARY = Path(_C.__file__).with_name("liblayerlr_cuda.so")


class Tuning(NamedTuple):
    """What a plan may choose freely, results being the same to the bit; 0: by the device."""

    blocks: int = 0  # of the grid, at most
    distance: int = 0  # items between a layer's last first-pass item and its first second-pass one


_tuning = Tuning()


@contextlib.contextmanager
def tuning(**values: Any) -> Iterator[None]:
    """Plans that are built within use these values of `Tuning`, for measurements and tests."""
    global _tuning
    before, _tuning = _tuning, Tuning(**values)
    try:
        yield
    finally:
        _tuning = before


@functools.cache
def load() -> _C.CudaLibrary:
    """The kernels, from their library, which is opened once. RuntimeError: it is not to be used."""
    return _C.open_cuda_library(str(LIBRARY))


def left_out() -> str | None:
    """Why there are no kernels, or None."""
    if _C.NO_CUDA:
        return f"was not built: {_C.NO_CUDA}"
    try:
        load()
    except RuntimeError as error:
        return f"cannot be loaded: {error}"
    return None


@functools.cache
def refusal(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None; asked once for each.

    A cubin runs on its own major compute capability from its minor one on, PTX on all from its own
    on. The PTX is that of the oldest cubin (``setup.py``), so a GPU that is not older has either.
    """

    def written(architecture: int) -> str:
        return f"{architecture // 10}.{architecture % 10}"

    major, minor = torch.cuda.get_device_capability(index)
    capability, oldest = 10 * major + minor, int(load().architectures[0])
    if capability < oldest:
        remedy = f": install it with LAYERLR_CUDA_ARCH={capability}" if capability >= 80 else ""
        return (
            f"was built for compute capability {written(oldest)} and above, cuda:{index} has "
            f"{written(capability)}{remedy}"
        )
    try:
        load().device_info(index)
    except RuntimeError as error:
        return f"cannot use cuda:{index}: {error}"
    return None


class CudaBackend:
    """float32, float64, bfloat16, float16 and complex parameters in memory of an NVIDIA GPU.

    Compute capability 8.0 and above. Nothing waits for the device: step counts and verdicts on
    non-finite gradients stay there.
    """

    name = "cuda"
    device = "cuda"

    def library(self) -> _C.CudaLibrary:
        """The kernels."""
        return load()

    def missing(self, device: torch.device) -> str | None:
        """Why a device has no such engine."""
        if device.type != self.device or torch.version.hip:
            return f"does not support parameters on {device}"
        if reason := left_out() or devices.absent(device):
            return reason
        return refusal(torch.cuda.current_device() if device.index is None else device.index)

    def unsupported(self, spec: PlanSpec) -> str | None:
        """Why a case must go elsewhere."""
        return (
            self.missing(spec.table.device)
            or native.unsupported(spec)
            or native.counts_elsewhere(spec, spec.table.device)
        )

    def plan(self, spec: PlanSpec) -> CudaPlan:
        """Plan for a supported case."""
        return CudaPlan(spec, self)


class CudaPlan(native.NativePlan):
    """A plan with tables in device memory, built at its first step.

    A step is one launch, and one more for what changed since the last one; halves are one launch
    and two.
    """

    def __init__(self, spec: PlanSpec, backend: CudaBackend) -> None:
        super().__init__(spec, _C.DevicePlan(native.bound(spec), backend.library(), *_tuning))
        self.name = backend.name  # type: ignore[misc]

    @property
    def memory(self) -> int:
        """Bytes of device memory that the plan keeps: O(layers) and 0.02 an element."""
        return self._native.memory()

    def numbers(self, config: StepConfig) -> tuple[Any, ...]:
        """Those on the host, and those on the device, for which nobody waits."""
        return config.values, config.tensors

    def measure(self, config: StepConfig) -> Tensor:
        """The first pass."""
        if config.changes_nothing:
            return self.spec.stats.new_zeros(len(self.spec.table.layers), 4)
        return super().measure(config)

    def refresh(self, config: StepConfig) -> None:
        """A launch, where there was a step."""
        self._native.refresh(*self.numbers(config))
