"""Names for parameters that came without: those of the attached model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .layers import names_of


def of_model(model: nn.Module, params: Iterable[Tensor], others: Iterable[str]) -> list[str]:
    """The names that a model has for parameters; ``others`` for those that are not the model's."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known.get(id(p), name) for p, name in zip(params, others, strict=True)]


def adopt(groups: list[dict[str, Any]], model: nn.Module) -> bool:
    """Name the parameters of all groups after a model's; whether a name changed.

    Names that the user gave stay, and so does the place of a parameter that is not the model's.
    """
    before = [names_of(group, index) for index, group in enumerate(groups)]
    after = []
    for index, (group, names) in enumerate(zip(groups, before, strict=True)):
        places = names_of({"params": group["params"]}, index)
        found = of_model(model, group["params"], names)
        after.append(
            [
                new if name == place else name
                for new, name, place in zip(found, names, places, strict=True)
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
        places = names_of(param_group, len(groups))
        param_group["param_names"] = of_model(model, params, places)
