"""The state dict of a wrapped optimizer: the base's beside the wrapper's, under ``base.`` keys.

Everything lies where torch's own tools look for it: per parameter in ``state``, per group in
``param_groups``.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.optim.optimizer import Optimizer

_BASE = "base."
#: keys of a group that base and wrapper share
SHARED = ("params", "param_names")

Packed = dict[str, Any]


class State(defaultdict[Any, Packed]):
    """A wrapper's state, which counts as empty (``if optimizer.state``) while the base has none.

    `torch.distributed.checkpoint` has an optimizer with an empty state take a step of lr 0, so that
    there are tensors to load into; most bases create theirs at their first step.
    """

    def __init__(self, base: Optimizer, own: Packed) -> None:
        super().__init__(dict, own)
        self._base = base

    def __bool__(self) -> bool:
        return bool(self._base.state) and len(self) > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self._base, dict(self))


def join(ours: Packed, theirs: Packed) -> Packed:
    """One state dict of two over the same parameters."""
    state = dict(ours["state"])
    for index, values in theirs["state"].items():
        state[index] = state.get(index, {}) | {f"{_BASE}{k}": v for k, v in values.items()}
    groups = [
        mine | {f"{_BASE}{k}": v for k, v in base.items() if k not in SHARED}
        for mine, base in zip(ours["param_groups"], theirs["param_groups"], strict=True)
    ]
    more = {k: v for k, v in theirs.items() if k not in ("state", "param_groups")}
    return ours | {"state": state, "param_groups": groups} | ({_BASE: more} if more else {})


def split(packed: Packed) -> tuple[Packed, Packed]:
    """The wrapper's part of what `join` gave, and the base's.

    Raises
    ------
    ValueError
        For the state dict of an optimizer that is not wrapped, and for one that
        `torch.distributed.checkpoint` had flattened, which is no more than the wrapper's part.
    """
    if not any(_is_base(key) for group in packed["param_groups"] for key in group):
        raise ValueError(
            "the state dict is not that of a wrapped optimizer: load one of the base alone with "
            "optimizer.base.load_state_dict(...); of torch.distributed.checkpoint, which leaves "
            "the base out where it flattens, use the form that is not flattened"
        )
    ours, theirs = _rest(packed), dict(packed.get(_BASE, {}))
    ours["state"] = {k: own for k, v in packed["state"].items() if (own := _rest(v))}
    theirs["state"] = {k: of for k, v in packed["state"].items() if (of := _of_base(v))}
    ours["param_groups"] = [_rest(group) for group in packed["param_groups"]]
    theirs["param_groups"] = [
        _of_base(group) | {k: group[k] for k in SHARED if k in group}
        for group in packed["param_groups"]
    ]
    return ours, theirs


def _is_base(key: object) -> bool:
    return str(key).startswith(_BASE)


def _of_base(values: Packed) -> Packed:
    return {k[len(_BASE) :]: v for k, v in values.items() if _is_base(k)}


def _rest(values: Packed) -> Packed:
    return {k: v for k, v in values.items() if not _is_base(k)}
