"""Refusals of arguments and parameters, before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import precision as precisions
from .layers import names_of


def flags(defaults: dict[str, Any]) -> None:
    """torch's own refusals of flags that exclude each other, in its words."""
    if defaults.get("fused"):
        if defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def params(group: dict[str, Any], index: int) -> None:
    """Refuse parameters that no backend can step, naming them."""
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        if group.get("fused"):
            _device_dtype_check_for_fused(p)
        if not (p.is_floating_point() or p.is_complex()) or p.dtype.itemsize == 1:
            raise ValueError(
                f"parameter {name!r} has dtype {p.dtype}, which cannot be optimized: keep it out "
                "of the optimizer or convert it to a floating-point dtype of 16 bits or more"
            )
        if is_traceable_wrapper_subclass(p):
            raise ValueError(
                f"parameter {name!r} is a {type(p).__name__}: sharded and wrapped tensors are not "
                "supported yet, a layer's norm would be that of its local part; keep the model "
                "whole (DistributedDataParallel) or use torch.optim"
            )
        if torch._debug_has_internal_overlap(p) == 1:
            raise ValueError(
                f"parameter {name!r} holds several elements in one place of memory, which cannot "
                "be stepped one by one: make it contiguous (an expanded tensor's .clone())"
            )


def precision(group: dict[str, Any], index: int) -> None:
    """Refuse a ``precision`` that is unknown, or not for a parameter of the group."""
    wanted, seed = group["precision"], group.get("seed")
    if wanted is not None and wanted not in precisions.KEYS:
        raise ValueError(
            f"Invalid precision: {wanted!r}, wanted None, 'master', 'stochastic' or 'kahan'"
        )
    if seed is not None and not isinstance(seed, int):
        raise ValueError(f"Invalid seed: {seed!r}, wanted None or an integer")
    if wanted is not None and group["differentiable"]:
        raise ValueError("precision does not work with differentiable=True, which cannot round")
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        if wanted == "stochastic" and p.dtype == torch.float16:
            raise ValueError(
                f"precision='stochastic' rounds to bfloat16, parameter {name!r} is {p.dtype}: use "
                "precision='master' or precision='kahan'"
            )


def capturable(group: dict[str, Any]) -> None:
    """Refuse ``capturable=True`` where nothing can be captured, in torch's words."""
    if group.get("capturable") and not torch.compiler.is_compiling():
        for p in group["params"]:
            if p.device.type == "cpu":
                raise RuntimeError(
                    "If capturable=True, params and state_steps must be on supported devices: "
                    "['cuda', 'xpu', 'hpu', 'privateuseone', 'xla']."
                )
