"""Lion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .base import Direction, Scalar, sign


class Lion(Direction):
    """``m <- b2*m + (1-b2)*g;  u = sign(alpha*m + (1-alpha)*g)``, ``alpha = b1/b2``.

    With m the new state: the sign of Lion's ``b1*m_old + (1-b1)*g`` (Chen et al. 2023, Algorithm
    2), which is the same sum but for rounding. ``b1 = b2``: exactly the sign of m.
    """

    name = "lion"
    states = ("exp_avg",)

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = (float(b) for b in group["betas"])
        if beta2 == 0:
            raise ValueError(
                "Invalid beta parameter at index 1: 0.0; the step is formed from the momentum, "
                "which must hold some of the past: for signSGD take betas=(0.0, b) with any b > 0"
            )
        return beta1, beta2

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        beta1, beta2, *_ = hyper
        return beta2, 1.0 - beta2, beta1 / beta2, 1.0 - beta1 / beta2

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        return (s[0] * c[0] + g * c[1],)

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return sign(s[0] * c[2] + g * c[3])
