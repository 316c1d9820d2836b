"""The lr of a wrapper and of its base.

A rule that sets the length of the step has an lr of its own, and the base's follows it by the ratio
to what it was: the base's is the rate of what the rule does not govern. So it is in groups without
a rule beside such a rule. Elsewhere the two have one lr.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from . import checks, plain_lr, rules
from .rules import LayerRule

Group = dict[str, Any]


def settle(ours: Group, theirs: Group, defaults: Group) -> None:
    """Find the lr of a new group of the wrapper; ``reference_lr`` stands where the base's follows.

    ``defaults``: the wrapper's lr and rule.

    Raises
    ------
    ValueError
        For a missing lr, and for one that nothing can follow.
    """
    rule = rules.resolve(ours.get("rule", defaults["rule"]))
    beside_own = has_own(rules.resolve(defaults["rule"]))
    if not (has_own(rule) or (rule is None and beside_own)):
        shared = ours.get("lr", None if beside_own else defaults["lr"])
        shared = theirs.get("lr") if shared is None else shared
        ours["lr"] = 1.0 if shared is None else shared
        checks.lr(ours["lr"])
        return
    lr = ours.setdefault("lr", defaults["lr"])
    if lr is None:
        raise ValueError(
            f"rule {rule.name if rule else rule!r} sets the length of the step: give lr, the angle "
            "or the ratio that it turns or moves layers by"
        )
    checks.lr(lr)
    ours["reference_lr"] = plain_lr.reference(ours, "the base's rate")


def has_own(rule: LayerRule | None) -> bool:
    """Whether a rule's lr is none of the base."""
    return rule is not None and rule.sets_length


def now(ours: Group, theirs: Group) -> float | Tensor | None:
    """The base's lr for the coming step; None where it has none."""
    of_base: float | Tensor | None = theirs.get("lr")
    if of_base is None:
        return None
    lr, reference = _read(ours["lr"]), ours.get("reference_lr")
    if reference is None:
        return of_base if ours["lr"] is of_base else lr
    return of_base if isinstance(lr, float) and lr == reference else of_base * (lr / reference)


@contextmanager
def written(ours: Sequence[Group], theirs: Sequence[Group]) -> Iterator[None]:
    """Within, the base's groups have the lr of the step; one that follows is put back."""
    own = []
    try:
        for mine, base in zip(ours, theirs, strict=True):
            lr = now(mine, base)
            if lr is None:
                continue
            if mine.get("reference_lr") is not None:
                own.append((base, base["lr"]))
            base["lr"] = lr
        yield
    finally:
        for base, lr in own:
            base["lr"] = lr


def _read(lr: float | Tensor) -> float | Tensor:
    """A number that the host has is a number; one on a device is not waited for."""
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
