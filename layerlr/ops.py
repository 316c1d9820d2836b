"""``torch.ops.layerlr.step_``, the step that ``torch.compile`` sees.

Eager steps go through a cached native plan, which a compiler cannot look into; the registered op
does the same from plain tensors and numbers. It knows weights that are held as they are: under
``precision`` a step is a graph break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the op)
from .backends.base import Hyper, PlanSpec


@torch.library.register_fake("layerlr::step_")
def _(params: list[Tensor], *_: Any) -> None:
    """Nothing is returned, nothing changes shape."""


def _number(x: float | Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64)


def step_(spec: PlanSpec, h: Hyper) -> None:
    """Step the parameters of a table that have a gradient."""
    table, rule, direction = spec.table, spec.rule, spec.direction
    active = [i for i, p in enumerate(table.params) if p.grad is not None]
    place = {tensor: k for k, tensor in enumerate(active)}
    states: list[dict[str, Any]] = [spec.states[i] for i in active]  # type: ignore[misc]
    spans: list[int] = []
    leaders: list[int] = []
    kept: list[Tensor] = []
    key = None if rule is None else rule.kept
    absent = {s.layer for s in table.spans if s.tensor not in place}
    led: set[int] = set()
    parts: dict[int, int] = {}
    for span in table.spans:
        part = parts.get(span.tensor, 0)
        parts[span.tensor] = part + 1
        stored = (spec.states[span.tensor] or {}).get(key) if key else None
        if stored is not None and span.layer not in led:
            led.add(span.layer)
            if span.layer not in absent or not (rule and rule.latches):
                leaders += [span.layer, len(kept), part]
                kept.append(stored)
        if span.tensor in place:
            spans += [place[span.tensor], span.begin, span.end, span.layer]
    torch.ops.layerlr.step_(
        [table.params[i] for i in active],
        [table.params[i].grad for i in active],
        [state[k] for state in states for k in direction.states],
        [state["step"] for state in states],
        kept,
        spec.stats,
        _number(h.lr),
        direction.name,
        "" if rule is None else rule.kernel,
        spans,
        [int(r) for r in table.ruled],
        leaders,
        table.lr_scale,
        [] if rule is None else list(rule.hyper()),
        list(h.direction),
        h.weight_decay,
        h.decoupled,
        _number(h.sign),
        _number(h.found_inf),
        h.skip,
    )
