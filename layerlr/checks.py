"""Refusals of arguments and parameters, before anything is changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import precision as precisions
from . import rules, shards
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
        if shards.is_sharded(p):
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
        if torch._debug_has_internal_overlap(shards.local_part(p)) == 1:
            raise ValueError(
                f"parameter {name!r} holds several elements in one place of memory, which cannot "
                "be stepped one by one: make it contiguous (an expanded tensor's .clone())"
            )


def _sharded(name: str, p: Tensor, group: dict[str, Any]) -> None:
    """Refuse DTensors that cannot be stepped, naming them."""
    reason = shards.refusal(p)
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


def capturing(device: torch.device) -> bool:
    """Whether what is launched there is recorded for a CUDA graph, not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def capture(group: dict[str, Any], index: int) -> None:
    """Refuse to capture a step that replays could not take whole, saying why."""
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        if not capturing(p.device):
            raise RuntimeError(
                f"parameter {name!r} is on {p.device}, where nothing is captured: a CUDA graph of "
                "the step would not update it; give it to an optimizer of its own"
            )
        if p.requires_grad and p.grad is None:
            raise RuntimeError(
                f"parameter {name!r} has no gradient, and the CUDA graph that is captured would "
                "never update it: capture a step after backward(), or within the graph, or freeze "
                "the parameter with requires_grad_(False)"
            )
    rule = rules.resolve(group["rule"])
    if isinstance(rule, rules.Estimated):
        raise RuntimeError(
            f"the step of param group {index} cannot be captured in a CUDA graph: its rule looks "
            "at the model"
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
