"""What follows lr by its ratio: ``plain_lr * lr / reference_lr``, and a corrected weight decay.

Under a rule lr may be an angle or a ratio, which is no rate for a bias. Schedulers write lr alone,
so ``plain_lr`` follows it by the ratio to the lr that it was given with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .conditions import holds

Group = dict[str, Any]


def settle(group: Group, index: int) -> None:
    """Remember the lr that ``plain_lr`` and ``corrected_decay`` go with, unless that is known.

    An lr on a device is waited for, once.

    Raises
    ------
    ValueError
        For a rate that is none, and where lr is none to follow, naming what to give instead.
    """
    plain = group.get("plain_lr")
    if plain is None and not group.get("corrected_decay"):
        return
    if plain is not None:
        if not holds(lambda x: 0.0 <= x < float("inf"), plain):
            raise ValueError(f"Invalid plain_lr: {plain!r}, wanted None or a finite number >= 0")
        plain = group["plain_lr"] = float(plain)
    what = "corrected_decay" if plain is None else f"plain_lr={plain}"
    where = f" of param group {index}"
    instead = f", or the group key reference_lr, the lr at which {what} is meant"
    group["reference_lr"] = reference(group, what, where, instead)


def reference(group: Group, what: str, where: str = "", instead: str = "") -> float:
    """The lr at which something that follows lr by its ratio is meant: the first one, if not known.

    Raises
    ------
    ValueError
        For an lr that nothing can follow.
    """
    known = group.get("reference_lr")
    if known is not None and not holds(lambda x: 0.0 < x < float("inf"), known):
        raise ValueError(f"Invalid reference_lr{where}: {known!r}, wanted a finite number > 0")
    found = float(group["lr"] if known is None else known)
    if not 0.0 < found < float("inf"):
        raise ValueError(
            f"{what} follows lr by its ratio, and lr{where} is {found}: give a nonzero lr and let "
            f"a scheduler warm it up{instead}"
        )
    return found


def ratio(group: Group) -> float:
    """Factor on lr of what the rule does not govern, in a group that is settled."""
    plain = group.get("plain_lr")
    return 1.0 if plain is None else float(plain) / float(group["reference_lr"])


def check_use(given: float | None, groups: Iterable[Group]) -> None:
    """Refuse a constructor's ``plain_lr`` where no group has a rule.

    Raises
    ------
    ValueError
        Saying so.
    """
    if given is not None and all(group["rule"] is None for group in groups):
        raise ValueError(
            f"plain_lr={given} is the rate of what the rule does not govern, and there is no "
            "rule: give a rule, or give this rate as lr"
        )
