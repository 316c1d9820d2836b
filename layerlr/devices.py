"""What is asked of a device."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device is recorded for a CUDA graph, not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
