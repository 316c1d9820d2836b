"""What cannot be wrapped, before anything is changed."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim.optimizer import Optimizer

from . import _C, devices, rules
from .rules import LayerRule

#: what is said where a scheduler works on the base
SCHEDULED = (
    "a scheduler was made for the base of a wrapper: it does not reach the layers under the rule. "
    "Make it for the wrapper, which layerlr.wrap returned"
)


def innermost(optimizer: Any) -> Any:
    """The optimizer itself, which Accelerate's and Lightning's have as their ``optimizer``."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def base(optimizer: object, ours: type) -> None:
    """Refuse what is no optimizer, and one whose steps have steps."""
    if innermost(optimizer) is not optimizer and isinstance(innermost(optimizer), ours):
        raise TypeError(
            f"{type(optimizer).__name__} has an optimizer of layerlr inside, which takes a rule "
            "itself: make that one with rule=..., or wrap it before"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"wrap wants a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if type(optimizer).state_dict is not Optimizer.state_dict and not (
        {"state", "param_groups"} <= optimizer.state_dict().keys()
    ):
        raise TypeError(
            f"state dicts of {type(optimizer).__name__} have a form of their own, which a wrapper "
            "cannot hold: wrap the optimizer inside of it, and put it around the result"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} takes several steps with its closure: a rule cannot be "
            "put on each of them"
        )


#: keys of a wrapper's group that say something, and those that must say nothing
_HERE = {"params", "param_names", "lr", "initial_lr", "rule", "layers", "adapt", "split"}
_HERE |= {"lr_factor", "reference_lr", "seed", "on_nonfinite", "differentiable", "estimated"}
_OF_BASE: dict[str, Any] = {"weight_decay": 0.0, "maximize": False, "max_grad_norm": None}
_OF_BASE |= {"precision": None, "state_dtype": "float32", "plain_lr": None}
_OF_BASE |= {"corrected_decay": False}


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


def groups(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Refuse to step a base that has got groups of its own, and numbers that reach nothing."""
    if len(ours) != len(theirs):
        raise RuntimeError(
            f"the base has {len(theirs)} param groups, its wrapper {len(ours)}: add groups by the "
            "wrapper's add_param_group"
        )
    for index, (group, base) in enumerate(zip(ours, theirs, strict=True)):
        if not _C.same_objects(group["params"], base["params"]):
            raise RuntimeError(
                f"param group {index} of a wrapper has other parameters than its base's: change "
                "both lists alike, or wrap the base again"
            )
        for key in (group.keys() & base.keys() | _OF_BASE.keys()) - _HERE:
            if key not in _OF_BASE or group[key] != _OF_BASE[key]:
                raise ValueError(
                    f"{key}={group[key]!r} of param group {index} has no effect on a wrapper, "
                    f"whose base has its own: set optimizer.base.param_groups[{index}][{key!r}]"
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
