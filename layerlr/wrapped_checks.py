"""What cannot be wrapped, before anything is changed."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim.optimizer import Optimizer

from . import devices, rules
from .rules import LayerRule


def base(optimizer: object) -> None:
    """Refuse what is no optimizer, and one whose steps have steps."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"wrap wants a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(optimizer).__name__} takes several steps with its closure: a rule cannot be "
            "put on each of them"
        )


def capture(groups: list[dict[str, Any]]) -> None:
    """Refuse to capture a step, the base's numbers of which a graph would hold for ever."""
    if any(devices.capturing(p.device) for group in groups for p in group["params"][:1]):
        raise RuntimeError(
            "the step of a wrapped optimizer cannot be captured in a CUDA graph: use one of "
            "layerlr's own classes there"
        )


def same_groups(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Refuse to step a base that has got groups of its own."""
    if len(ours) != len(theirs):
        raise RuntimeError(
            f"the base has {len(theirs)} param groups, its wrapper {len(ours)}: add groups by the "
            "wrapper's add_param_group"
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
