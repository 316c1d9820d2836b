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
    min_ratio, max_ratio
        Bounds on r. >= 0, the second not below the first; None: no bound. A floor on the relative
        step ``|u|*lr/|w| >= t`` of a direction with rate lr is ``min_ratio = 1/t`` at the rate
        ``lr*t``: the step is ``lr*u``, or longer where that is less than ``t*lr*|w|``.

    Notes
    -----
    The first four options are timm's. r is 1 where the weights or the step are zero. On Adam: two
    passes, 40 bytes per float32 parameter.

    References
    ----------
    You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020,
    arXiv:1904.00962, algorithm 2. The floor: modded-nanogpt's track 3, #274.

    Examples
    --------
    >>> opt = layerlr.AdamW(model.named_parameters(), lr=2**-6, rule=Lamb(clip=10.0))
    """

    clip: float | None = None
    trust_clip: bool = False
    bias_correction: bool = True
    grad_averaging: bool = True
    min_ratio: float | None = None
    max_ratio: float | None = None

    name = "lamb"
    plain_at_zero = True
    order = "update"

    def __post_init__(self) -> None:
        self._check("clip", lambda x: x is None or x > 0, "None or a number > 0")
        self._check("min_ratio", lambda x: x is None or x >= 0, "None or a number >= 0")
        self._check(
            "max_ratio",
            lambda x: x is None or x >= (self.min_ratio or 0.0),
            "None or a number that is not below min_ratio",
        )
        for name in ("trust_clip", "bias_correction", "grad_averaging"):
            self._check_choice(name, (True, False))

    @property
    def sets_length(self) -> bool:  # type: ignore[override]
        """Unless the ratio is bounded."""
        return self.hyper()[1:] == (0.0, math.inf)

    def hyper(self) -> tuple[float, ...]:
        most = math.inf if self.max_ratio is None else float(self.max_ratio)
        clip = math.inf if self.clip is None else float(self.clip)
        return clip, float(self.min_ratio or 0.0), min(most, 1.0) if self.trust_clip else most

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        w, u = s.ww.sqrt(), s.uu.sqrt()
        clip, least, most = self.hyper()
        r = (w.clamp(max=clip) / u).clamp(min=least).clamp(max=most)
        r = torch.where((w > 0) & (u > 0), r, 1.0)
        one = constant(1.0, lr)
        return LayerScale(one, one, torch.where(u > 0, -(lr * r), 0.0), r)


@dataclasses.dataclass(frozen=True)
class Relative(Lamb):
    """``w <- w - lr*|w|*u/|u|``: LAMB without its decay, a step that is ``lr*|w|`` long.

    Decoupled weight decay is no part of u: it is taken beside the step, as AdamW has it.

    Notes
    -----
    Known as relative update or ELR control. The parameters are those of `Lamb`.

    Examples
    --------
    >>> opt = layerlr.AdamW(model.named_parameters(), lr=2**-6, rule="relative")
    """

    name = kernel = "relative"
    decays_apart = True
