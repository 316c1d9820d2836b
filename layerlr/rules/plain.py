"""The rule that parameters outside every layer follow."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Plain(LayerRule):
    """``f = 1``, or ``b = -lr``: the step of the direction itself.

    Parameters outside every layer follow it in the order that their group's rule has.
    """

    name = "plain"
    order = "gradient"
    adapts = "all"

    def factor(self, s: LayerStats, lr: Tensor, weight_decay: float) -> Tensor:
        return constant(1.0, s.gg)

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        one = constant(1.0, lr)
        return LayerScale(one, one, -lr, one)
