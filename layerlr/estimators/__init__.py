"""What rules look at the model for: `layerlr.rules.Curvature` and `layerlr.rules.BackMatching`.

| file | what it holds |
|---|---|
| `watch.py` | the model that was attached, and its last batch, to be run once more |
| `layers.py` | the layers of a plan: sums, what they keep, the coming step |
| `curvature.py` | step sizes from products with the Hessian, differences, or `fisher.py` |
| `fisher.py`, `taps.py` | products of each sample; hooks that take them from the modules |
| `back_matching.py` | rates: `structural.py` or `probe.py` |
| `structural.py`, `grams.py` | factors along the traced graph; a formula for each operation |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from layerlr.rules import BackMatching, Curvature, Estimated

from . import back_matching, curvature
from .curvature import Again
from .layers import Joined, Layers
from .watch import ModelWatch, random_state


def estimate(views: Sequence[Layers], watch: ModelWatch | None, again: Again | None) -> None:
    """Write the rates of every layer whose estimate is due.

    Raises
    ------
    RuntimeError
        Where a rule lacks the model, the closure, or the graph of the gradients.
    """
    by_rule: dict[Estimated, list[Layers]] = {}
    for view in views:
        if view.active and view.rule.due(view.step):
            by_rule.setdefault(view.rule, []).append(view)
    for rule, those in by_rule.items():
        if watch is None and not rule.second_order:  # those look at the gradients' graph alone
            raise RuntimeError(
                f"rule {rule.name!r} looks at the model: call optimizer.attach(model) before the "
                "first step"
            )
        if isinstance(rule, Curvature):
            curvature.estimate(rule, Joined(rule, those), watch, again)
        elif isinstance(rule, BackMatching):
            assert watch is not None
            back_matching.estimate(rule, Joined(rule, those), watch)


def release(params: Iterable[Tensor]) -> None:
    """Let go of the graphs that gradients hold: with their parameters they are never freed."""
    for p in params:
        if p.grad is None or not p.grad.requires_grad:
            continue
        if p.grad._is_view():
            p.grad = p.grad.detach()
        else:
            p.grad.detach_()


__all__ = ["Layers", "ModelWatch", "estimate", "random_state", "release"]
