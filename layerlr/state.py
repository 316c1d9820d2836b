"""Optimizer state: what is created, and checked where it is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import advice, codes, dtensor, layers, memory, precision
from .backends.base import state_dtype
from .directions import Direction
from .layer_table import LayerTable


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
    of_sgd = direction.states == ("momentum_buffer",) and "dampening" in group
    if len(present) < len(direction.states) and (of_sgd or not present):
        _start_afresh(state, p, quietly=of_sgd)
    _complete_moments(state, p, name, group, direction)
    _complete_count(state, p, bool(present))
    for key, initial in of_layers.items() if parts else ():
        _complete_numbers(state, key, p, initial, parts)
    if group["precision"] is not None and precision.applies(p):
        _complete_weights(state, p, name, group, number)


def _complete_moments(
    state: dict[str, Any], p: Tensor, name: str, group: dict[str, Any], direction: Direction
) -> None:
    """Numbers of each element, in the bits that ``state_dtype`` says."""
    coded = layers.governs(layers.adapted(group, "kernels"), name, p)
    for key in direction.states:
        value = state.get(key)
        if value is None or _never_used(state, value, p):
            value = _new(p, direction.initial(group, key))
        else:
            _check_shape(key, value, tuple(p.shape), name)
            _check_kind(key, value, p, name)
            value = memory.writable(value.to(p.device))
            value = dtensor.placed_as(p, value, f"state {key!r} of parameter {name!r}")
        state[key] = value
        wanted = codes.dtype_of(p, group["state_dtype"], coded, key in direction.nonnegative)
        codes.convert(state, key, p, wanted, name)


def _complete_count(state: dict[str, Any], p: Tensor, has_moments: bool) -> None:
    """The number of steps, on the device: whether a step is skipped is decided there."""
    step = state.get("step")
    if isinstance(step, Tensor):
        state["step"] = memory.writable(step.to(p.device))
        return
    # torch's SGD has no count; a buffer that is there has seen a step
    count = float(has_moments) if step is None else float(step)
    state["step"] = torch.full((), count, dtype=_get_scalar_dtype(), device=p.device)


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


def _start_afresh(state: dict[str, Any], p: Tensor, quietly: bool) -> None:
    """Take the count away where the moments that it counts are none.

    Quietly of SGD: torch never dampens a new buffer, and the count tells a new one.
    """
    step = state.pop("step", None)
    others = [
        key
        for key, x in state.items()
        if isinstance(x, Tensor) and x.shape == p.shape and x.dim() > 0
        if key not in precision.KEYS.values() and not key.endswith("_scale")
    ]
    if others and not quietly and (step is None or float(step) > 0):
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
