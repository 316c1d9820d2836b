"""`describe`: what an optimizer resolved its arguments to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import base_lr, statistics
from .backends import COLUMNS
from .layers import names_of
from .optimizer import LayerwiseOptimizer
from .wrapped_checks import innermost
from .wrapping import Wrapped

_HEADER = ("parameter", "shape", "layer", "rule", "role", "lr", "decay", "backend")


def describe(optimizer: LayerwiseOptimizer) -> str:
    """Print and return a table with a line for each parameter.

    Its columns: parameter, shape, layer, rule, role (``adapted``: the rule governs it; ``plain``:
    it takes the plain step; ``frozen``: it does not move; ``base``: it takes the step of the
    optimizer that `wrap` was given), lr (its own: with ``lr_factor``, and ``plain_lr`` for the
    plain), weight decay, backend, which of a base is its class. A parameter that is split over
    several layers has a line for each. Layers that were skipped for a non-finite gradient follow
    below, with their number of steps, and layers that started at zero and have not reached their
    radius; to read both, the device is waited for.

    Raises
    ------
    TypeError
        For an optimizer of another package.

    Examples
    --------
    >>> layerlr.describe(layerlr.AdamW(model.named_parameters(), lr=0.01, rule="lamb"))
    """
    optimizer = innermost(optimizer)
    if not isinstance(optimizer, LayerwiseOptimizer):
        raise TypeError(
            f"describe wants an optimizer of layerlr, got {type(optimizer).__name__}: "
            "layerlr.wrap(optimizer, rule) makes one of any"
        )
    lines: list[tuple[str, ...]] = [_HEADER]
    skipped: list[str] = []
    growing: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        rows: dict[int, list[tuple[str, ...]]] = {}
        base = _of_base(optimizer, index)
        for of_table in optimizer.plans.fitting(index).tables:
            table, backend = of_table.table, of_table.backend
            counts = of_table.stats[:, COLUMNS.index("skipped")].tolist()
            skipped += [f"{n} ({k:.0f})" for n, k in zip(table.layers, counts, strict=True) if k]
            radii = statistics.grows_to(group["rule"], of_table).tolist()
            growing += [
                f"grows from zero by plain steps to norm {radius:.4g} ({name})"
                for name, radius in zip(table.layers, radii, strict=True)
                if radius
            ]
            for span in table.spans:
                p, name = table.params[span.tensor], table.names[span.tensor]
                ruled = table.ruled[span.layer]
                role = "adapted" if ruled else "plain"
                rule = repr(group["rule"]) if ruled else "-"
                lr = _short(float(group["lr"]) * table.lr_scale[span.layer])
                layer = table.layers[span.layer] if ruled else "-"
                decay = base[1] if base else _short(group["weight_decay"])
                line = (name, str(tuple(p.shape)), layer, rule, role, lr, decay, backend)
                rows.setdefault(id(p), []).append(line)
        for name, p in dict.fromkeys(zip(names_of(group, index), group["params"], strict=True)):
            shape = str(tuple(p.shape))
            others = [(name, shape, "-", "-", "frozen", "0", "0", "-")]
            if base and p.requires_grad:
                others = [(name, shape, "-", "-", "base", *base)]
            lines += rows.get(id(p), others)
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    if skipped:
        text += f"\nskipped for a non-finite gradient: {', '.join(skipped)}"
    text = "\n".join((text, *growing))
    print(text)
    return text


def _of_base(optimizer: LayerwiseOptimizer, index: int) -> tuple[str, str, str] | None:
    """lr, weight decay and class of the base of a wrapper, for a param group; None: no wrapper."""
    if not isinstance(optimizer, Wrapped):
        return None
    group = optimizer.base.param_groups[index]
    lr = base_lr.now(optimizer.param_groups[index], group)
    return _short(lr), _short(group.get("weight_decay")), type(optimizer.base).__name__


def _short(x: float | Tensor | Any) -> str:
    """A number to read; ``-`` for none."""
    return "-" if x is None else f"{float(x):.4g}"
