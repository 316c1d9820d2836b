"""Whether memory holds a place of its own for each element of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dtensor


def is_writable(x: Tensor) -> bool:
    """Whether a step can write into a tensor: no expanded one, no zeros without memory."""
    if dtensor.is_sharded(x):
        return True
    lies_apart = torch._debug_has_internal_overlap(x) != 1 and not x._is_zerotensor()
    return lies_apart and (not x.is_inference() or torch.is_inference_mode_enabled())


def writable(x: Tensor) -> Tensor:
    """The tensor, or a copy that a step can write into and that holds elements as they are."""
    if dtensor.is_sharded(x) or (is_writable(x) and not x.is_conj() and not x.is_neg()):
        return x
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device).copy_(x.detach())
