"""A brake on growth: steps that lengthen the weights do so in part."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Brake(LayerRule):
    """``w <- w - lr*u``; where that is longer than w, its length is ``|w| + outward*(growth)``.

    In closed form, from the sums of a layer::

        n = sqrt(ww - 2*lr*wu + lr^2*uu);  k = (|w| + outward*(n - |w|))/n  where n > |w|, else 1
        w <- k*w - k*lr*u

    Parameters
    ----------
    outward
        Part of the growth that is taken. In [0, 1]; 1 is the plain step, 0 lets no layer grow.

    Notes
    -----
    The direction turns as it would without a rule; only the length is held back. Decoupled weight
    decay is part of u. Two passes, 28 bytes per float32 parameter on SGD with momentum, 40 on Adam.

    References
    ----------
    The radial brake of the modded-nanogpt speed runs (track 3, #294) and of NVIDIA's
    Emerging-Optimizers; the closed form is ours.

    Examples
    --------
    >>> opt = layerlr.AdamW(model.named_parameters(), lr=1e-3, rule=Brake(outward=0.3))
    """

    outward: float = 0.5

    name = "brake"
    order = "update"

    def __post_init__(self) -> None:
        self._check("outward", lambda x: 0 <= x <= 1, "a number in [0, 1]")

    def hyper(self) -> tuple[float, ...]:
        return (float(self.outward),)

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        norm = s.ww.sqrt()
        moved = (s.ww - 2.0 * lr * s.wu + lr * lr * s.uu).clamp(min=0.0).sqrt()
        one = constant(1.0, lr)
        k = torch.where(moved > norm, (norm + self.outward * (moved - norm)) / moved, one)
        return LayerScale(one, k, -(k * lr), k)
