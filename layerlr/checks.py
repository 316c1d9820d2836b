"""Refusals of arguments and parameters, before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import dtensor, rules
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
        if dtensor.is_sharded(p):
            _sharded(name, p, group)
        elif is_traceable_wrapper_subclass(p):
            raise ValueError(
                f"parameter {name!r} is a {type(p).__name__}: of wrapped tensors only DTensor is "
                "supported; unwrap it or use torch.optim"
            )
        if group["rule"] is not None and hasattr(p, "_fsdp_flattened"):
            raise ValueError(
                f"parameter {name!r} is flattened by FullyShardedDataParallel, where the norms of "
                "layers cannot be had: shard with torch.distributed.fsdp.fully_shard, or use "
                "rule=None"
            )
        if torch._debug_has_internal_overlap(dtensor.local_part(p)) == 1:
            raise ValueError(
                f"parameter {name!r} holds several elements in one place of memory, which cannot "
                "be stepped one by one: make it contiguous (an expanded tensor's .clone())"
            )


def _sharded(name: str, p: Tensor, group: dict[str, Any]) -> None:
    """Refuse DTensors that cannot be stepped, naming them."""
    reason = dtensor.refusal(p)
    if reason:
        raise ValueError(f"parameter {name!r} {reason}")
    rule = group["rule"]
    if isinstance(rule, rules.Estimated):
        raise ValueError(
            f"parameter {name!r} is sharded, and rule {rule.name!r} looks at whole gradients: keep "
            "the model whole (DistributedDataParallel) or take another rule"
        )
    if group["differentiable"]:
        raise ValueError(f"parameter {name!r} is sharded: differentiable=True is not supported")


def max_grad_norm(group: dict[str, Any]) -> float | None:
    """A group's bound on the norm of all gradients.

    Raises
    ------
    ValueError
        For a bound that is not above 0, and where it does not go with the rule.
    """
    limit = group.get("max_grad_norm")
    if limit is None:
        return None
    if not limit > 0.0:
        raise ValueError(f"Invalid max_grad_norm: {limit!r}, wanted None or a number above 0")
    if isinstance(group["rule"], rules.Estimated):
        raise ValueError(
            f"max_grad_norm does not go with rule {group['rule'].name!r}, whose rates are those of "
            "the unclipped step: call torch.nn.utils.clip_grad_norm_ before it"
        )
    return float(limit)


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
