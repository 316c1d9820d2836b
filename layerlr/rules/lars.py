"""LARS."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .base import LayerRule, LayerStats


@dataclasses.dataclass(frozen=True)
class Lars(LayerRule):
    """``f = trust*|w| / (|g| + weight_decay*|w| + eps)``.

    ``g`` is the raw gradient, before L2 decay; the factor scales ``g + weight_decay*w`` before
    momentum sees it. Decoupled decay does not enter the ratio.

    Parameters
    ----------
    trust
        Trust coefficient, >= 0.
    eps
        Added to the denominator, >= 0.
    trust_clip
        ``f = min(f/lr, 1)``, so that ``lr*f`` is at most lr (LARC's clipping mode, as in timm).

    Notes
    -----
    Where the weights or the gradient are all zero the factor is 1, as in timm: such a layer takes
    the plain step, which is about 1/trust times its usual rate. Two passes, 28 bytes per float32
    parameter on SGD with momentum.

    References
    ----------
    You, Gitman, Ginsburg: Large Batch Training of Convolutional Networks, 2017, arXiv:1708.03888,
    equation 6 and algorithm 1.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=1.0, momentum=0.9, rule=Lars(trust=0.02))
    """

    trust: float = 1e-3
    eps: float = 1e-8
    trust_clip: bool = False

    name = "lars"
    plain_at_zero = True
    order = "gradient"
    measures_ww = True
    raw_gradient = True

    def __post_init__(self) -> None:
        self._check("trust", lambda x: x >= 0, "a number >= 0")
        self._check("eps", lambda x: x >= 0, "a number >= 0")
        self._check_choice("trust_clip", (True, False))

    def hyper(self) -> tuple[float, ...]:
        return float(self.trust), float(self.eps), float(self.trust_clip)

    def factor(self, s: LayerStats, lr: Tensor, weight_decay: float) -> Tensor:
        w, g = s.ww.sqrt(), s.gg.sqrt()
        f = self.trust * w / (g + weight_decay * w + self.eps)
        if self.trust_clip:
            f = torch.where(f < lr, f / lr, 1.0)
        return torch.where((w > 0) & (g > 0), f, 1.0)
