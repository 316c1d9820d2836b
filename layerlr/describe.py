"""`describe`: what an optimizer resolved its arguments to."""

from __future__ import annotations

from .layers import names_of
from .optimizer import LayerwiseOptimizer

_HEADER = ("parameter", "shape", "layer", "rule", "role", "lr", "backend")


def describe(optimizer: LayerwiseOptimizer) -> str:
    """Print and return a table with a line for each parameter.

    Its columns: parameter, shape, layer, rule, role (``adapted``: the rule governs it; ``plain``:
    it takes the plain step; ``frozen``: it does not move), lr times lr_scale, backend. A parameter
    that is split over several layers has a line for each.
    """
    lines: list[tuple[str, ...]] = [_HEADER]
    for index, group in enumerate(optimizer.param_groups):
        rows: dict[str, list[tuple[str, ...]]] = {}
        for of_table in optimizer.plans.fitting(index).tables:
            table, backend = of_table.table, of_table.backend
            for span in table.spans:
                p, name = table.params[span.tensor], table.names[span.tensor]
                ruled = table.ruled[span.layer]
                role = "adapted" if ruled else "plain"
                rule = repr(group["rule"]) if ruled else "-"
                lr = f"{float(group['lr']) * table.lr_scale[span.layer]:.4g}"
                layer = table.layers[span.layer] if ruled else "-"
                line = (name, str(tuple(p.shape)), layer, rule, role, lr, backend)
                rows.setdefault(name, []).append(line)
        for name, p in zip(names_of(group, index), group["params"], strict=True):
            frozen = (name, str(tuple(p.shape)), "-", "-", "frozen", "0", "-")
            lines += rows.get(name, [frozen])
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
    text = "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    print(text)
    return text
