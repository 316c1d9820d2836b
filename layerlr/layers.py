"""Which parameters form a layer, and which of them a rule governs."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .conditions import holds, plain_value
from .layer_table import LayerTable, Span, row_length, rows

if TYPE_CHECKING:
    from .rules import LayerRule

LayerKey = Callable[[str, Tensor], Hashable]
Adapt = Callable[[str, Tensor], bool]


def names_of(group: dict[str, Any], index: int) -> list[str]:
    """Names of a group's parameters: the user's, or their place."""
    given = group.get("param_names")
    if given is not None:
        if len(given) != len(group["params"]):
            raise ValueError(
                f"param group {index} has {len(given)} names for {len(group['params'])} "
                "parameters: give 'param_names' one for each, or take that key away"
            )
        return [str(n) for n in given]
    return [f"group{index}.param{i}" for i in range(len(group["params"]))]


def _ask(option: str, given: Callable[[str, Tensor], Any], name: str, p: Tensor) -> Any:
    """What a callable says of a parameter; one that does not take both arguments is refused."""
    try:
        return given(name, p)
    except TypeError:
        _check_arguments(option, given, name, p)
        raise


def _check_arguments(option: str, given: Callable[..., Any], *arguments: Any) -> None:
    try:
        inspect.signature(given).bind(*arguments)
    except ValueError:
        return  # one of C's has no signature
    except TypeError as error:
        raise TypeError(f"{option} is called as (name, param): {error}") from error


def layer_key(layers: str | LayerKey, name: str, p: Tensor) -> tuple[Hashable, str]:
    """Key of the layer that a parameter belongs to, and the layer's name."""
    if callable(layers):
        key = _ask("layers", layers, name, p)
        if not holds(lambda given: hash(given) is not None, key):
            raise ValueError(f"layers gave {key!r} for {name!r}, wanted a key of dicts: a string")
        return key, str(key)
    if layers == "module":
        module = name.rpartition(".")[0]
        return module, module or "(root)"
    return id(p), name  # two models may have the same names


def is_kernel(p: Tensor) -> bool:
    """Whether a parameter is a matrix or more: two or more dimensions are larger than 1."""
    return sum(n > 1 for n in p.shape) >= 2


def governs(adapt: str | Adapt, name: str, p: Tensor) -> bool:
    """Whether ``adapt`` puts a parameter under the rule."""
    if callable(adapt):
        return bool(_ask("adapt", adapt, name, p))
    return adapt == "all" or (adapt == "kernels" and is_kernel(p))


def adapted(group: dict[str, Any], without_rule: str) -> Any:
    """What a group's rule governs: ``adapt``, or the rule's own choice."""
    rule = group["rule"]
    return group["adapt"] or (without_rule if rule is None else rule.adapts)


def build_tables(group: dict[str, Any], index: int, plain: float | None) -> list[LayerTable]:
    """Tables of a validated param group, one for each device.

    A parameter that is listed twice steps twice, as in torch: it is in a second table.
    ``plain``: factor on lr of what the rule does not govern; None leaves that out.

    Raises
    ------
    ValueError
        Where ``split`` does not fit a parameter, ``lr_factor`` has another length than there are
        layers, a layer has parameters on several devices, or names do not tell modules apart.
    """
    rule, layers, split = group["rule"], group["layers"], group.get("split")
    if isinstance(split, Iterator):  # which the next parameter, or build, would find empty
        split = group["split"] = list(split)
    adapt = adapted(group, "all")
    frozen = plain is None or (rule is not None and rule.freezes)
    tables: dict[tuple[torch.device, int], LayerTable] = {}
    place: dict[Hashable, tuple[torch.device, int]] = {}  # layer key -> device, layer in its table
    times: Counter[int] = Counter()
    named: dict[str, Tensor] = {}
    governed = 0
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        inside = governs(adapt, name, p)
        if frozen and not (inside and rule is not None):
            continue
        if layers == "module" and named.setdefault(name, p) is not p:
            raise ValueError(
                f"layers='module' tells modules apart by name, and {name!r} is the name of two "
                f"parameters of group {index}: give each model a group or a prefix of its own"
            )
        time = times[id(p)]
        times[id(p)] += 1
        empty = LayerTable([], [], [], [], [], [], [], again=time > 0)
        table = tables.setdefault((p.device, time), empty)
        tensor = len(table.params)
        table.params.append(p)
        table.names.append(name)
        sizes = _blocks(split, name, p) if inside and split is not None else [rows(p)]
        key, title = layer_key(layers, name, p) if inside else (None, name)
        begin = 0
        for block, size in enumerate(sizes):
            where = (time, inside, key if inside else id(p), block)
            if where not in place:
                place[where] = p.device, len(table.layers)
                table.layers.append(title if len(sizes) == 1 else f"{title}[{block}]")
                table.ruled.append(inside and rule is not None)
                table.places.append(governed if inside else None)
                governed += inside
            device, layer = place[where]
            if device != p.device:
                raise ValueError(
                    f"layer {title!r} has parameters on {device} and on {p.device} ({name!r}): "
                    "give them different layer keys"
                )
            table.spans.append(Span(tensor, begin, begin + size, layer))
            begin += size
    set_lr_scale(list(tables.values()), group, plain)
    for table in tables.values():
        averages = rule is not None and rule.averages
        table.start_radius = _sizes(table) if averages else _start_radii(table, rule)
    return list(tables.values())


def _sizes(table: LayerTable) -> list[float]:
    """The number of weights, at least 1; a complex number is two."""
    sizes = [0.0] * len(table.layers)
    for span in table.spans:
        sizes[span.layer] += (span.end - span.begin) * row_length(table.params[span.tensor])
    return [max(size, 1.0) for size in sizes]


def _start_radii(table: LayerTable, rule: LayerRule | None) -> list[float]:
    """The rule's own, or the norm that torch's initialisation of linear and convolutional layers
    gives: weights uniform within 1/sqrt(fan_in), so a third for each row; a vector is one row.
    """  # noqa: D205
    if rule is None or not rule.latches:
        return [0.0] * len(table.layers)
    if rule.start_radius is not None:
        return [rule.start_radius] * len(table.layers)
    squares = [0.0] * len(table.layers)
    for span in table.spans:
        p = table.params[span.tensor]
        blocks = span.end - span.begin if is_kernel(p) else 1
        squares[span.layer] += blocks / 3 if p.numel() else 0.0
    return [math.sqrt(square) for square in squares]


def _blocks(split: int | Sequence[int], name: str, p: Tensor) -> list[int]:
    n, split = rows(p), plain_value(split)
    if isinstance(split, int):
        if split < 1 or n % split:
            raise ValueError(
                f"split={split} does not divide dim 0 of parameter {name!r}, which has {n} rows: "
                "give the sizes of the blocks, or put the parameter into a group of its own"
            )
        return [n // split] * split
    if not holds(lambda sizes: all(s == int(s) for s in sizes), split):
        raise ValueError(f"Invalid split: {split!r}, wanted a whole number, or several")
    sizes = [int(s) for s in split]
    if sum(sizes) != n or any(s < 1 for s in sizes):
        raise ValueError(
            f"split={sizes} does not sum to dim 0 of parameter {name!r}, which has {n} rows"
        )
    return sizes


def set_lr_scale(tables: Sequence[LayerTable], group: dict[str, Any], plain: float | None) -> None:
    """Set the factor on lr of each layer of a group's tables; if that fails, nothing has changed.

    Raises
    ------
    ValueError
        Where ``lr_factor`` is no factor, or has another length than there are layers.
    """
    if not tables:
        return
    factor, plain = group.get("lr_factor", 1.0), plain or 0.0
    if isinstance(factor, Iterator):  # which the next build would find empty
        factor = group["lr_factor"] = list(factor)
    factor = plain_value(factor)
    names = {k: t.layers[i] for t in tables for i, k in enumerate(t.places) if k is not None}
    one = isinstance(factor, (int, float))
    values = [factor] * len(names) if one else factor
    if not holds(lambda xs: all(0.0 <= x < math.inf for x in xs), values):
        raise ValueError(f"Invalid lr_factor: {factor!r}, wanted finite numbers >= 0")
    if len(values) != len(names):
        raise ValueError(
            f"lr_factor has {len(values)} entries for {len(names)} layers "
            f"({', '.join(names[k] for k in sorted(names))})"
        )
    values = [float(x) for x in values]
    outside = plain * (float(factor) if one else 1.0)
    for table in tables:
        table.lr_scale = [
            outside if k is None else values[k] if ruled else plain * values[k]
            for k, ruled in zip(table.places, table.ruled, strict=True)
        ]
