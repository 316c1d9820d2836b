"""The rule that parameters outside every layer follow."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .base import LayerRule, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Plain(LayerRule):
    """``f = 1``: the step of the direction itself."""

    name = "plain"
    order = "gradient"
    adapts = "all"

    def factor(self, s: LayerStats, lr: Tensor, weight_decay: float) -> Tensor:
        return constant(1.0, s.gg)
