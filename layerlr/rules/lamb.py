"""LAMB."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Lamb(LayerRule):
    """``w <- w - lr*r*u``, ``r = phi(|w|)/|u|``, ``phi(x) = min(x, clip)``.

    ``u`` includes decoupled weight decay, ``u + weight_decay*w``; its sums follow from those of
    ``u``, so no pass is spent on it.

    Parameters
    ----------
    clip
        Upper bound on ``|w|`` in phi, > 0; None: no bound.
    trust_clip
        Limit r to at most 1.
    bias_correction
        False: Adam's moments are not corrected for their start at zero.
    grad_averaging
        False: ``m <- b1*m + g`` instead of ``b1*m + (1-b1)*g``.

    Notes
    -----
    The four options are timm's. r is 1 where the weights or the step are zero. On Adam: two
    passes, 40 bytes per float32 parameter.

    References
    ----------
    You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020,
    arXiv:1904.00962, algorithm 2.
    """

    clip: float | None = None
    trust_clip: bool = False
    bias_correction: bool = True
    grad_averaging: bool = True

    name = "lamb"
    order = "update"

    def __post_init__(self) -> None:
        self._check("clip", self.clip, self.clip is None or self.clip > 0, "None or a number > 0")

    def hyper(self) -> tuple[float, ...]:
        return math.inf if self.clip is None else float(self.clip), float(self.trust_clip)

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        w, u = s.ww.sqrt(), s.uu.sqrt()
        if self.clip is not None:
            w = w.clamp(max=self.clip)
        r = w / u
        if self.trust_clip:
            r = r.clamp(max=1.0)
        r = torch.where((w > 0) & (u > 0), r, 1.0)
        one = constant(1.0, lr)
        return LayerScale(one, one, torch.where(u > 0, -(lr * r), 0.0), r)
