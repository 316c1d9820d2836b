"""Refusals of arguments and parameters, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _device_dtype_check_for_fused
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import dtensor, memory, rules
from .conditions import holds, is_number
from .layers import names_of

#: what is on or off: torch's flags, and ours
_FLAGS = (
    *("amsgrad", "capturable", "centered", "corrected_decay", "decoupled_weight_decay"),
    *("differentiable", "foreach", "fused", "maximize", "nesterov"),
)


def flags(defaults: dict[str, Any]) -> None:
    """torch's own refusals of flags that exclude each other, in its words."""
    if defaults.get("fused"):
        if defaults["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def lr(value: float | Tensor) -> None:
    """Refuse a learning rate below 0, in torch's words, as the following do."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    _within("learning rate", value, lambda x: x >= 0.0, "a number >= 0")


def at_least_zero(name: str, value: Any) -> None:
    """Refuse a number below 0, and what is none."""
    _within(f"{name} value", value, lambda x: x >= 0.0, "a number >= 0")


def eps(value: float) -> None:
    """Refuse an epsilon below 0."""
    _within("epsilon value", value, lambda x: x >= 0.0, "a number >= 0")


def average(name: str, value: float) -> None:
    """Refuse what is no weight of an average."""
    _within(f"{name} value", value, lambda x: 0.0 <= x <= 1.0, "a number in [0, 1]")


def number(name: str, value: Any) -> None:
    """Refuse what is no number."""
    _within(f"{name} value", value, lambda x: True, "a number")


def _within(what: str, value: Any, condition: Callable[[Any], Any], wanted: str) -> None:
    if not is_number(value):
        raise ValueError(f"Invalid {what}: {value!r}, wanted {wanted}")
    if not condition(value):
        raise ValueError(f"Invalid {what}: {value}")


def betas(
    given: tuple[float | Tensor, float | Tensor], foreach: bool | None, capturable: bool
) -> tuple[float, float]:
    """The betas as numbers, where they are in [0, 1) and both of one kind."""
    if not holds(lambda x: len(x) == 2, given):
        raise ValueError(f"Invalid betas: {given!r}, wanted two numbers in [0, 1)")
    for i, beta in enumerate(given):
        what, wanted = f"beta parameter at index {i}", "a number in [0, 1)"
        _within(what, beta, lambda x: 0.0 <= x < 1.0, wanted)
    kinds = {isinstance(beta, Tensor) for beta in given}
    if len(kinds) != 1 or not all(isinstance(beta, (float, Tensor)) for beta in given):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(given):
        if isinstance(beta, Tensor):
            if foreach and not capturable:
                raise ValueError(
                    f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True"
                )
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
    return float(given[0]), float(given[1])


def hyper_parameters(group: dict[str, Any], defaults: dict[str, Any], index: int) -> None:
    """Refuse what is no number in a group where its default is one, or several."""
    for key, default in defaults.items():
        given, ok, wanted = group[key], True, "a number"
        if key == "betas":
            ok, wanted = holds(lambda x: [*map(is_number, x)] == [True, True], given), "two numbers"
        elif key == "lr" or (is_number(default) and not isinstance(default, bool)):
            ok = is_number(given)
        if not ok:
            raise ValueError(f"Invalid {key} of param group {index}: {given!r}, wanted {wanted}")


def flags_of_group(group: dict[str, Any], index: int) -> None:
    """Refuse a string for a flag, as configurations have them: any of them would be true."""
    for key in _FLAGS:
        if isinstance(group.get(key), str):
            raise ValueError(
                f"Invalid {key} of param group {index}: {group[key]!r}, wanted True or False"
            )


def lazy(name: str, p: Tensor) -> None:
    """Refuse a parameter without a shape, in torch's words."""
    if is_lazy(p):
        raise ValueError(
            f"Attempted to use an uninitialized parameter: {name!r} is of a lazy module, which "
            "gives it its shape at its first forward pass: run one before the optimizer is made"
        )


def module(caller: str, model: object) -> None:
    """Refuse what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} wants a torch.nn.Module, got {type(model).__name__}")


def params(group: dict[str, Any], index: int) -> None:
    """Refuse parameters that no backend can step, naming them."""
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        lazy(name, p)
        if group.get("fused") and not p.is_meta:  # what meta tensors become is seen later
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
        if not memory.lies_apart(dtensor.local_part(p)):
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


def rule(rule: rules.LayerRule | None, owner: type) -> rules.LayerRule | None:
    """A rule, unless it is that of a class of its own and this is another."""
    if isinstance(rule, rules.AdamMini):
        raise ValueError(
            f"rule {rule.name!r} is no rule on top of {owner.__name__}: it is all of "
            "layerlr.AdamMini, use that class"
        )
    return rule


def corrected_decay(group: dict[str, Any], index: int, decoupled: bool) -> None:
    """Refuse a decay that follows lr where it is part of the gradient, or lr is on a device."""
    if not group["corrected_decay"]:
        return
    if not decoupled:
        raise ValueError(
            f"corrected_decay of param group {index} is for decoupled weight decay: use AdamW, "
            "Lion, or Adam with decoupled_weight_decay=True"
        )
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        raise ValueError(
            f"corrected_decay of param group {index} needs an lr that the host can read: give a "
            "number, or a tensor on the CPU"
        )
