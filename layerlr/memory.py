"""Whether a step can read a tensor and write into it, and copies of those that it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import dtensor


def lies_apart(x: Tensor) -> bool:
    """Whether each element has a place of its own: not in expanded tensors and memoryless zeros."""
    return torch._debug_has_internal_overlap(x) != 1 and not x._is_zerotensor()


def is_writable(x: Tensor) -> bool:
    """Whether a step can write into a tensor; an inference tensor it can within inference mode."""
    if dtensor.is_sharded(x):
        return True
    return lies_apart(x) and (not x.is_inference() or torch.is_inference_mode_enabled())


def writable(x: Tensor) -> Tensor:
    """The tensor, or a copy that a step can write into and that holds elements as they are."""
    if dtensor.is_sharded(x) or (is_writable(x) and not x.is_conj() and not x.is_neg()):
        return x
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device).copy_(x.detach())


def check(name: str, tensors: Mapping[str, Any]) -> None:
    """Raise RuntimeError, naming the parameter, where one of its tensors has lost memory."""
    for what, x in tensors.items():
        if not isinstance(x, Tensor) or not _has_storage(x):
            continue
        end = x.storage_offset() + 1
        end += sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        there, wanted = x.untyped_storage().nbytes(), end * x.element_size()
        if there < wanted:
            raise RuntimeError(
                f"the memory of parameter {name!r}, its {what}, was freed (its storage has {there} "
                f"bytes of {wanted}): bring it back before the step, or take its gradient away"
            )


def _has_storage(x: Tensor) -> bool:
    if not x.numel() or x.layout != torch.strided or x._is_zerotensor():
        return False
    return not dtensor.is_sharded(x)
