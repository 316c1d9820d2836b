"""Names for parameters that came without: those of the attached model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layers import names_of


def adopt(groups: list[dict[str, Any]], model: nn.Module) -> bool:
    """Name the parameters of all groups after a model's; whether a name changed.

    Names that the user gave stay, and so does the place of a parameter that is not the model's.
    """
    known = {id(p): name for name, p in model.named_parameters()}
    before = [names_of(group, index) for index, group in enumerate(groups)]
    after = []
    for index, (group, names) in enumerate(zip(groups, before, strict=True)):
        places = names_of({"params": group["params"]}, index)
        after.append(
            [
                known.get(id(p), name) if name == place else name
                for p, name, place in zip(group["params"], names, places, strict=True)
            ]
        )
    if after == before:
        return False
    for group, names in zip(groups, after, strict=True):
        group["param_names"] = names  # in all groups or none: torch wants it so
    return True


def join(param_group: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Name the bare parameters of a new group where the others have their names from a model."""
    if not all("param_names" in group for group in groups) or "param_names" in param_group:
        return
    params = param_group["params"]
    if isinstance(params, set):
        return  # refused by torch
    params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
    if all(isinstance(p, Tensor) for p in params):
        known = {id(p): name for name, p in model.named_parameters()}
        places = names_of(param_group, len(groups))
        names = [known.get(id(p), place) for p, place in zip(params, places, strict=True)]
        param_group["param_names"] = names
