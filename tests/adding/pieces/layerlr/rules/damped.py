"""A rule that shortens steps which are long beside the weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats


@dataclasses.dataclass(frozen=True)
class Damped(LayerRule):
    """``w <- w - lr*f*u``, ``f = |w| / (|w| + damping*|u|)``; 1 where u is zero."""

    damping: float = 1.0

    name = "damped"
    order = "update"

    def __post_init__(self) -> None:
        self._check("damping", lambda x: x >= 0, "a number >= 0")

    def hyper(self) -> tuple[float, ...]:
        return (float(self.damping),)

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        w, u = s.ww.sqrt(), s.uu.sqrt()
        f = torch.where(u > 0, w / (w + self.damping * u), 1.0)
        one = torch.ones_like(f)
        return LayerScale(one, one, -lr * f, f)
