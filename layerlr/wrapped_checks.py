"""What cannot be wrapped, before anything is changed."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim.optimizer import Optimizer

from . import _C, devices, options, rules
from .rules import LayerRule

#: what is said where a scheduler works on the base
SCHEDULED = (
    "a scheduler was made for the base of a wrapper, and does not reach the layers under the rule: "
    "make it for the wrapper, which layerlr.wrap returned (if it is gone, all is well)"
)


def innermost(optimizer: Any) -> Any:
    """The optimizer itself, which Accelerate's and Lightning's have as their ``optimizer``."""
    inside = getattr(optimizer, "optimizer", None)
    return optimizer if inside is None or inside is optimizer else innermost(inside)


def base(optimizer: object, ours: type) -> None:
    """Refuse what is no optimizer, and one whose steps have steps."""
    if innermost(optimizer) is not optimizer and isinstance(innermost(optimizer), ours):
        raise TypeError(
            f"{type(optimizer).__name__} has an optimizer of layerlr inside, which takes a rule "
            "itself: make that one with rule=..., or wrap it before"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"wrap wants a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(optimizer, ours):
        _form(optimizer)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} takes several steps with its closure: a rule cannot be "
            "put on each of them"
        )


def _form(optimizer: Optimizer) -> None:
    """Refuse state dicts that cannot lie beside a wrapper's, where there are some by now."""
    if type(optimizer).state_dict is Optimizer.state_dict:
        return
    try:
        keys = optimizer.state_dict().keys()
    except Exception:  # ZeRO's wants to be gathered first
        return
    if not {"state", "param_groups"} <= keys:
        raise TypeError(
            f"state dicts of {type(optimizer).__name__} have a form of their own, which a wrapper "
            "cannot hold: wrap the optimizer inside of it, and put it around the result"
        )


#: our keys that say nothing in a wrapper's group, and what they are there
_OF_BASE: dict[str, Any] = {"weight_decay": 0.0, "maximize": False, "max_grad_norm": None}
_OF_BASE |= {"precision": None, "state_dtype": "float32", "plain_lr": None}
_OF_BASE |= {"corrected_decay": False}
#: keys of both that may differ
_OF_BOTH = {*options.OPTIONS, *options.GROUP_ONLY, "lr", "differentiable"} - {*_OF_BASE}


def scheduled(optimizer: Optimizer) -> bool:
    """Whether a scheduler of torch's was made for an optimizer."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def capture(groups: list[dict[str, Any]]) -> None:
    """Refuse to capture a step, the base's numbers of which a graph would hold for ever."""
    if any(devices.capturing(p.device) for group in groups for p in group["params"][:1]):
        raise RuntimeError(
            "the step of a wrapped optimizer cannot be captured in a CUDA graph: use one of "
            "layerlr's own classes there"
        )


def groups(ours: list[dict[str, Any]], base: Optimizer) -> None:
    """Refuse to step a base that has got groups of its own, and numbers that reach nothing."""
    theirs = base.param_groups
    if len(ours) != len(theirs):
        raise RuntimeError(
            f"the base has {len(theirs)} param groups, its wrapper {len(ours)}: add groups by the "
            "wrapper's add_param_group"
        )
    of_base = base.defaults.keys() - _OF_BOTH
    for index, (group, other) in enumerate(zip(ours, theirs, strict=True)):
        if not _C.same_objects([*group["params"]], [*other["params"]]):
            raise RuntimeError(
                f"param group {index} of a wrapper has other parameters than its base's: change "
                "both lists alike, or wrap the base again"
            )
        for key in of_base & group.keys() | _OF_BASE.keys():
            value = group.get(key)
            if value not in (None, _OF_BASE.get(key)) and value != other.get(key):
                raise ValueError(
                    f"{key}={value!r} of param group {index} has no effect on a wrapper, whose "
                    f"base has its own: set optimizer.base.param_groups[{index}][{key!r}]"
                )


def factor(group: dict[str, Any]) -> None:
    """Refuse a group's ``lr_factor`` where the base, with one lr for the group, cannot have it."""
    value = group.get("lr_factor", 1.0)
    if isinstance(value, (int, float)) and value == 1.0:
        return
    raise ValueError(
        f"lr_factor={value!r} has no effect under rule {group['rule'].name!r}, which scales what "
        "the base sees of the gradients: give the base param groups with rates of their own"
    )


def rule(rule: LayerRule | None, theirs: dict[str, Any]) -> None:
    """Refuse a rule that cannot be put on a group of the base's, saying what to do instead."""
    if isinstance(rule, rules.Estimated):
        raise ValueError(
            f"rule {rule.name!r} finds its rates from directions of this package and cannot be put "
            "on another optimizer: use layerlr.SGD, layerlr.AdamW and the like"
        )
    if isinstance(rule, rules.Lamb) and not rule.sets_length and theirs.get("lr") is None:
        raise ValueError(
            f"{rule!r} bounds a ratio to the step at an lr of 1, and the base has no lr by which "
            "its step could be divided: leave the bounds out, or use Layca(max_angle=...)"
        )
    if rule is not None and rule.freezes:
        raise ValueError(
            f"{rule!r} cannot keep the base from moving what it does not govern: give the base no "
            "such parameters, or use others='plain'"
        )
