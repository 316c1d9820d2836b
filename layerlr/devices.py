"""What is asked of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A number in float64 on a device, for which nobody waits: it is written there, not copied."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device. To a GPU they go from pinned memory, so nobody waits."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def home(devices: Sequence[torch.device]) -> torch.device:
    """Where values of several devices are put together: on the first that is no CPU, if any."""
    return next((device for device in devices if device.type != "cpu"), devices[0])


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device is recorded for a CUDA graph, not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def capturing_now() -> bool:
    """Whether the current stream of the current GPU records a CUDA graph; False without a GPU."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def absent(device: torch.device) -> str | None:
    """Why torch cannot use a GPU, as the end of a sentence about an engine; None: it can."""
    if device.type != "cuda" or torch.cuda.is_available():
        return None
    if torch.backends.cuda.is_built():
        return "finds no GPU that torch can use"
    return f"finds no GPU: torch {torch.__version__} is built without CUDA"


def lost(device: torch.device) -> bool:
    """Whether nothing runs on a GPU any more in this process, after an illegal access, say."""
    if device.type != "cuda":
        return False
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False
