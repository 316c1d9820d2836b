"""What a state dict holds, and how groups and state are brought back from one."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import Tensor

from . import advice, codes, options, precision, rules
from .conditions import is_number, plain_value

#: dtypes of state of every element that a state dict may bring
_KEPT = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *codes.CODES)
#: group keys that may hold a callable, which a state dict cannot carry, and what stands for it
_MAYBE_CALLABLE = ("layers", "adapt")
_CALLABLE = "callable"


def pack_groups(groups: list[dict[str, Any]]) -> None:
    """Turn the groups of a state dict into plain values, in place."""
    for group in groups:
        rule = rules.resolve(group["rule"])
        group["rule"] = None if rule is None else rule.to_dict()
        for key in _MAYBE_CALLABLE:
            if callable(group[key]):
                group[key] = _CALLABLE
        for key, value in group.items():  # NumPy's cannot be loaded with weights alone
            group[key] = type(value)(map(_plain, value)) if key == "betas" else _plain(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, Tensor) else plain_value(value)


def unpack_groups(
    groups: list[dict[str, Any]], current: list[dict[str, Any]], defaults: dict[str, Any]
) -> None:
    """Undo `pack_groups` in place; what a group lacks comes from the current one, or a default.

    A warning names our own options that a state dict changes, as torch's way is to load them all.

    Raises
    ------
    ValueError
        For the groups of a wrapper.
    """
    replaced: dict[tuple[str, str, str], list[str]] = {}
    for index, group in enumerate(groups):
        old = current[index] if index < len(current) else {}
        if any(key.startswith("base.") for key in group):
            raise ValueError(
                "this is the state dict of an optimizer of layerlr.wrap, whose moments and lr are "
                "its base's: load it into a wrapper of such a base"
            )
        for key in _MAYBE_CALLABLE:
            if group.get(key) == _CALLABLE:
                del group[key]
        if not isinstance(group.get("lr_scale", 1.0), (int, float)):
            group.setdefault("lr_factor", group.pop("lr_scale"))  # its former name
        group["rule"] = rules.resolve(group.get("rule", old.get("rule", defaults["rule"])))
        for key in sorted(options.OPTIONS.keys() & group.keys() & old.keys()):
            before = rules.resolve(old[key]) if key == "rule" else old[key]
            if group[key] != before:
                replaced.setdefault((key, repr(group[key]), repr(before)), []).append(str(index))
        for key, default in defaults.items():
            group.setdefault(key, old.get(key, default))
        for key in options.GROUP_ONLY:
            if key in old:
                group.setdefault(key, old[key])
    for (key, new, old_one), indices in replaced.items():
        warnings.warn(
            f"{key}={new} came with the state dict and replaces {old_one} in param group "
            f"{', '.join(indices)}: to have it back, set the group's {key!r} after loading",
            stacklevel=advice.level_of_the_caller(),
        )


def restore_state(
    state: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]], loaded: dict[str, Any]
) -> None:
    """Give loaded state its saved dtype back, as torch casts it to the parameter's; find its count.

    Not where state of every element is in a dtype that would cut it off, as integers do that are no
    codes. Counts of steps that are in groups, as in apex's, go to the state that has none.
    """
    saved_ids = itertools.chain.from_iterable(g["params"] for g in loaded["param_groups"])
    params = itertools.chain.from_iterable(g["params"] for g in groups)
    for saved_id, p in zip(saved_ids, params, strict=True):
        for key, value in loaded["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and state[p][key].dtype != value.dtype:
                of_element = value.shape == p.shape and key not in precision.KEYS.values()
                if not of_element or value.dtype in _KEPT:
                    state[p][key] = value.to(device=p.device)
    for group in groups:
        if is_number(group.get("step")):
            step = float(group.pop("step"))
            for p in group["params"]:
                if state.get(p):
                    state[p].setdefault("step", step)
