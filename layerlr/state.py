"""Optimizer state: what is created, what a state dict may hold, how it is brought back."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import rules
from .backends.base import state_dtype
from .directions import Direction
from .layers import LayerTable

#: group keys that a state dict does not carry where they are not plain values
_MAYBE_CALLABLE = ("layers", "adapt")


def complete(
    state: dict[str, Any],
    p: Tensor,
    name: str,
    group: dict[str, Any],
    direction: Direction,
    radii: int,
) -> None:
    """Create what is missing in one parameter's state, and check what is there.

    ``radii`` is the number of stored radii (0: the rule keeps none). State moves to its
    parameter's device; its dtype is left alone.

    Raises
    ------
    RuntimeError
        Where a state tensor has another shape than its parameter.
    """
    loaded = False
    for key in direction.states:
        value = state.get(key)
        if value is None:
            state[key] = _new(p, direction.initial(group, key))
            continue
        if value.shape != p.shape:
            raise RuntimeError(
                f"state {key!r} of parameter {name!r} has shape {tuple(value.shape)}, the "
                f"parameter {tuple(p.shape)}: load a state dict of the same model, or delete "
                "optimizer.state[param] to start afresh"
            )
        loaded = True
        if value.device != p.device:
            state[key] = value.to(p.device)
    if state.get("step") is None:
        # torch's SGD keeps no count; a buffer that is there has seen a step
        device = p.device if group.get("capturable") or group.get("fused") else "cpu"
        state["step"] = torch.full((), float(loaded), dtype=_get_scalar_dtype(), device=device)
    elif not isinstance(state["step"], Tensor):
        state["step"] = torch.tensor(float(state["step"]), dtype=_get_scalar_dtype())
    if radii and (state.get("radius") is None or state["radius"].numel() != radii):
        state["radius"] = torch.zeros(radii, dtype=torch.float64, device=p.device)
    elif radii and state["radius"].device != p.device:
        state["radius"] = state["radius"].to(p.device)


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
) -> list[dict[str, Any] | None]:
    """State dicts of a table's parameters, completed; None for those that are frozen."""
    latches = group["rule"] is not None and group["rule"].latches
    radii = [0] * len(table.params)
    for span in table.spans:
        radii[span.tensor] += latches and table.ruled[span.layer]
    states: list[dict[str, Any] | None] = []
    for p, name, count in zip(table.params, table.names, radii, strict=True):
        if not p.requires_grad and p.grad is None and not optimizer_state.get(p):
            states.append(None)
            continue
        complete(optimizer_state[p], p, name, group, direction, count)
        states.append(optimizer_state[p])
    return states


def pack_groups(groups: list[dict[str, Any]]) -> None:
    """Turn the groups of a state dict into plain values, in place."""
    for group in groups:
        if group["rule"] is not None:
            group["rule"] = group["rule"].to_dict()
        for key in _MAYBE_CALLABLE:
            if callable(group[key]):
                del group[key]


def unpack_groups(
    groups: list[dict[str, Any]], current: list[dict[str, Any]], defaults: dict[str, Any]
) -> None:
    """Undo `pack_groups` in place; what a group lacks comes from the current one, or a default."""
    for group, old in itertools.zip_longest(groups, current, fillvalue={}):
        for key, default in defaults.items():
            group.setdefault(key, old.get(key, default))
        for key in ("split", "lr_scale"):
            if key in old:
                group.setdefault(key, old[key])
        group["rule"] = rules.resolve(group["rule"])


def restore_dtypes(
    state: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]], loaded: dict[str, Any]
) -> None:
    """Give loaded state its saved dtype back: torch casts it to the parameter's."""
    saved_ids = itertools.chain.from_iterable(g["params"] for g in loaded["param_groups"])
    params = itertools.chain.from_iterable(g["params"] for g in groups)
    for saved_id, p in zip(saved_ids, params, strict=True):
        for key, value in loaded["state"].get(saved_id, {}).items():
            if isinstance(value, Tensor) and state[p][key].dtype != value.dtype:
                state[p][key] = value.to(device=p.device)
