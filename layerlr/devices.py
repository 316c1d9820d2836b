"""What is asked of a device."""

from __future__ import annotations

import torch


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
