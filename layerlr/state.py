"""Optimizer state: what is created, what a state dict may hold, how it is brought back."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import advice, codes, dtensor, layers, memory, options, precision, rules
from .backends.base import state_dtype
from .conditions import is_number, plain_value
from .directions import Direction
from .layer_table import LayerTable

#: dtypes of state of every element that a state dict may bring
_KEPT = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *codes.CODES)
#: group keys that may hold a callable, which a state dict cannot carry, and what stands for it
_MAYBE_CALLABLE = ("layers", "adapt")
_CALLABLE = "callable"


def complete(
    state: dict[str, Any],
    p: Tensor,
    name: str,
    group: dict[str, Any],
    direction: Direction,
    of_layers: Mapping[str, float],
    parts: int,
    number: int,
) -> None:
    """Create what is missing in one parameter's state, and check what is there.

    ``of_layers``: keys and first values of the numbers that the rule stores for each of the
    parameter's ``parts`` that it governs; ``number``: the parameter's in the optimizer. State moves
    to its parameter's device, or is made anew where it was on ``meta``, and into the bits that
    ``state_dtype`` says: float32 where it was in fewer. float64 stays once a step was taken.

    Raises
    ------
    RuntimeError
        Where a state tensor has another shape than its parameter, or is sharded over other
        processes; where its memory was freed; where the count of steps is none.
    """
    if p.grad is not None:
        memory.check(name, state)
    _check_count(state.get("step"), name)
    if not p.is_meta:  # of a parameter that was materialised: its state held nothing yet
        for key in [k for k, x in state.items() if isinstance(x, Tensor) and x.is_meta]:
            del state[key]
    present = [key for key in direction.states if state.get(key) is not None]
    if len(present) < len(direction.states) and ("dampening" in group or not present):
        _start_afresh(state, quietly="dampening" in group)
    for key in direction.states:
        _complete_moments(state, key, p, name, group, direction)
    _complete_count(state, p, group, bool(present))
    for key, initial in of_layers.items() if parts else ():
        _complete_numbers(state, key, p, initial, parts)
    if group["precision"] is not None and precision.applies(p):
        _complete_weights(state, p, name, group, number)


def _complete_moments(
    state: dict[str, Any],
    key: str,
    p: Tensor,
    name: str,
    group: dict[str, Any],
    direction: Direction,
) -> None:
    """A number of each element, in the bits that ``state_dtype`` says."""
    value = state.get(key)
    if value is None or _never_used(state, value, p):
        value = _new(p, direction.initial(group, key))
    else:
        _check_shape(key, value, tuple(p.shape), name)
        _check_kind(key, value, p, name)
        value = memory.writable(value.to(p.device))
        value = dtensor.placed_as(p, value, f"state {key!r} of parameter {name!r}")
    state[key] = value
    coded = layers.governs(layers.adapted(group, "kernels"), name, p)
    wanted = codes.dtype_of(p, group["state_dtype"], coded, key in direction.nonnegative)
    codes.convert(state, key, p, wanted, name)


def _complete_count(
    state: dict[str, Any], p: Tensor, group: dict[str, Any], has_moments: bool
) -> None:
    """The number of steps, on the device: whether a step is skipped is decided there."""
    step = state.get("step")
    if isinstance(step, Tensor):
        state["step"] = memory.writable(step.to(p.device))
        return
    if step is None and has_moments:  # others count in the group; SGD's buffer has seen a step
        step = group["step"] if is_number(group.get("step")) else 1
    state["step"] = torch.full((), float(step or 0), dtype=_get_scalar_dtype(), device=p.device)


def _complete_numbers(
    state: dict[str, Any], key: str, p: Tensor, initial: float, parts: int
) -> None:
    """Numbers that a rule stores, one for each part of the parameter that it governs."""
    stored = state.get(key)
    if stored is None or (isinstance(stored, Tensor) and stored.numel() != parts):
        stored = initial
    if not isinstance(stored, Tensor):
        stored = torch.full((parts,), float(stored), dtype=torch.float64, device="cpu")
    state[key] = memory.writable(stored.to(p.device, torch.float64).contiguous())


def _complete_weights(
    state: dict[str, Any], p: Tensor, name: str, group: dict[str, Any], number: int
) -> None:
    """What ``precision`` holds beside the weights."""
    key = precision.KEYS[group["precision"]]
    if state.get(key) is not None:
        _check_shape(key, state[key], () if key == "rounding_seed" else tuple(p.shape), name)
    value = precision.complete(state, p, group["precision"], group.get("seed"), number)
    if key != "rounding_seed":
        value = dtensor.placed_as(p, value, f"state {key!r} of parameter {name!r}")
    state[key] = memory.writable(value)


def _start_afresh(state: dict[str, Any], quietly: bool) -> None:
    """Take the count away where the moments that it counts are none.

    Quietly of SGD: torch never dampens a new buffer, and the count tells a new one.
    """
    step = state.pop("step", None)
    others = [key for key, x in state.items() if isinstance(x, Tensor) and x.dim() > 0]
    if step is not None and others and not quietly and float(step) > 0:
        warnings.warn(
            f"state that was loaded has {', '.join(map(repr, others))}, as another optimizer's "
            "has, and no moments of this one: they start afresh, at step 0",
            stacklevel=advice.level_of_the_caller(),
        )


def _never_used(state: dict[str, Any], value: Any, p: Tensor) -> bool:
    """Whether the parameter changed its dtype before its first step: its state follows."""
    if not isinstance(value, Tensor) or value.dtype == state_dtype(p):
        return False
    step = state.get("step")
    return not codes.is_coded_of(p, value) and step is not None and float(step) == 0.0


def _check_count(step: Any, name: str) -> None:
    """Refuse what is no count of steps, where the host can tell."""
    if isinstance(step, Tensor) and step.numel() != 1:
        _check_shape("step", step, (), name)
    if step is None or (isinstance(step, Tensor) and step.device.type != "cpu"):
        return
    if not (0.0 <= float(step) < 2.0**53 and float(step).is_integer()):
        raise RuntimeError(
            f"state 'step' of parameter {name!r} is {float(step)}, wanted is the number of steps "
            "taken: set it right, or delete optimizer.state[param] to start afresh"
        )


def _check_shape(key: str, value: Any, wanted: tuple[int, ...], name: str) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape != wanted:
        found = f"is {value!r}" if shape is None else f"has shape {shape}"
        raise RuntimeError(
            f"state {key!r} of parameter {name!r} {found}, wanted is a tensor of shape "
            f"{wanted}: load a state dict of the same model, or delete optimizer.state[param] to "
            "start afresh"
        )


def _check_kind(key: str, value: Tensor, p: Tensor, name: str) -> None:
    if value.is_complex() != p.is_complex() or value.layout != torch.strided or value.is_mkldnn:
        raise RuntimeError(
            f"state {key!r} of parameter {name!r}, which is {p.dtype}, is {value.dtype} of layout "
            f"{value.layout}: load a state dict of the same model, or delete "
            "optimizer.state[param] to start afresh"
        )


def _new(p: Tensor, value: float) -> Tensor:
    state = torch.zeros_like(
        p, dtype=state_dtype(p), memory_format=torch.preserve_format, requires_grad=False
    )
    if value:
        (torch.view_as_real(state) if state.is_complex() else state).fill_(value)
    return state


def complete_table(
    optimizer_state: dict[Tensor, dict[str, Any]],
    table: LayerTable,
    group: dict[str, Any],
    direction: Direction,
    first: int,
) -> list[dict[str, Any] | None]:
    """State dicts of a table's parameters, completed; None for those that are frozen.

    ``first``: number of the group's first parameter in the optimizer.
    """
    numbers = {id(p): first + k for k, p in enumerate(group["params"])}
    of_layers: Mapping[str, float] = {} if group["rule"] is None else group["rule"].memory
    parts = [0] * len(table.params)
    for span in table.spans:
        parts[span.tensor] += table.ruled[span.layer]
    states: list[dict[str, Any] | None] = []
    for p, name, n in zip(table.params, table.names, parts, strict=True):
        if not p.requires_grad and p.grad is None and not optimizer_state.get(p):
            states.append(None)
            continue
        if not isinstance(optimizer_state[p], dict):
            raise RuntimeError(
                f"the state of parameter {name!r} is a {type(optimizer_state[p]).__name__}, wanted "
                "is a dict: optimizer.state[param] = dict(...)"
            )
        complete(optimizer_state[p], p, name, group, direction, of_layers, n, numbers[id(p)])
        states.append(optimizer_state[p])
    return states


def pack_groups(groups: list[dict[str, Any]]) -> None:
    """Turn the groups of a state dict into plain values, in place."""
    for group in groups:
        rule = rules.resolve(group["rule"])
        group["rule"] = None if rule is None else rule.to_dict()
        for key in _MAYBE_CALLABLE:
            if callable(group[key]):
                group[key] = _CALLABLE
        for key in options.OPTIONS.keys() | options.GROUP_ONLY.keys():
            if key in group:
                group[key] = plain_value(group[key])  # NumPy's cannot be loaded with weights alone


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
        for key in options.OPTIONS.keys() & group.keys() & old.keys():
            if group[key] != old[key]:
                replaced.setdefault((key, repr(group[key]), repr(old[key])), []).append(str(index))
        for key, default in defaults.items():
            group.setdefault(key, old.get(key, default))
        for key in options.GROUP_ONLY:
            if key in old:
                group.setdefault(key, old[key])
    for (key, new, before), indices in replaced.items():
        warnings.warn(
            f"{key}={new} came with the state dict and replaces {before} in param group "
            f"{', '.join(indices)}: to have it back, set the group's {key!r} after loading",
            stacklevel=advice.level_of_the_caller(),
        )


def restore_dtypes(
    state: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]], loaded: dict[str, Any]
) -> None:
    """Give loaded state its saved dtype back: torch casts it to the parameter's.

    Not where state of every element is in a dtype that would cut it off, as integers do that are no
    codes.
    """
    saved_ids = itertools.chain.from_iterable(g["params"] for g in loaded["param_groups"])
    params = itertools.chain.from_iterable(g["params"] for g in groups)
    for saved_id, p in zip(saved_ids, params, strict=True):
        for key, value in loaded["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and state[p][key].dtype != value.dtype:
                of_element = value.shape == p.shape and key not in precision.KEYS.values()
                if not of_element or value.dtype in _KEPT:
                    state[p][key] = value.to(device=p.device)
