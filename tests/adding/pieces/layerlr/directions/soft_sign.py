"""A sign without a jump."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .base import Direction, Scalar, root


class SoftSign(Direction):
    """``m <- b*m + (1-b)*g;  u = m / (|m| + eps)``."""

    name = "soft_sign"
    states = ("exp_avg",)

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["beta"]), float(group["eps"])

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        beta, eps, *_ = hyper
        return beta, 1.0 - beta, eps

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        return (s[0] * c[0] + g * c[1],)

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return s[0] / (root(s[0] * s[0]) + c[2])
