"""What rules look at the model for: `layerlr.rules.Curvature` and `layerlr.rules.BackMatching`.

Imported with the first optimizer that has such a rule, each of the packages with its rule.

| file | what it holds |
|---|---|
| `replay.py` | the model that was attached, and its last batch, to be run once more |
| `layers.py` | the layers of a plan: sums, memory, the coming step |
| `curvature/` | step sizes from the curvature along each layer's step |
| `back_matching/` | rates from the Jacobians above each layer |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from layerlr.rules import BackMatching, Curvature, Estimated

from .layers import Layers, LayerSet
from .replay import ModelReplay, random_state


def estimate(
    views: Sequence[Layers], model: ModelReplay | None, again: Callable[[], object] | None
) -> None:
    """Write the rates of every layer whose estimate is due.

    ``again`` evaluates the closure once more, as it was evaluated for this step.

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
        if model is None and not rule.second_order:  # those look at the gradients' graph alone
            raise RuntimeError(
                f"rule {rule.name!r} looks at the model: call optimizer.attach(model) before the "
                "first step's forward pass"
            )
        if isinstance(rule, Curvature):
            from . import curvature

            curvature.estimate(rule, LayerSet(rule, those), model, again)
        elif isinstance(rule, BackMatching):
            from . import back_matching

            assert model is not None
            back_matching.estimate(rule, LayerSet(rule, those), model)


def release(params: Iterable[Tensor]) -> None:
    """Let go of the graphs that gradients hold: with their parameters they are never freed."""
    for p in params:
        if p.grad is None or not p.grad.requires_grad:
            continue
        if p.grad._is_view():
            p.grad = p.grad.detach()
        else:
            p.grad.detach_()


__all__ = ["Layers", "ModelReplay", "estimate", "random_state", "release"]
