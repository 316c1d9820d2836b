"""What the plans of a param group depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .conditions import plain_value

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer


class GroupKey(NamedTuple):
    """All that a plan is built from, but for parameters and their state."""

    lr_factor: Any
    others: tuple[Any, ...]


def group_key(optimizer: LayerwiseOptimizer, group: dict[str, Any]) -> GroupKey:
    """The key of a group as it stands."""
    others = (
        optimizer.direction(group),
        group["rule"],
        group["layers"],
        group["adapt"],
        group["on_nonfinite"],
        _hashable(group.get("split")),
        _hashable(group.get("plain_lr")),
        group.get("reference_lr"),
        group["corrected_decay"],
        group["precision"],
        group["state_dtype"],
    )
    return GroupKey(_hashable(group.get("lr_factor")), others)


def _hashable(value: Any) -> Any:
    if value is None:  # as it mostly is: the questions below are slow
        return None
    value = plain_value(value)
    return tuple(value) if isinstance(value, Sequence) else value
