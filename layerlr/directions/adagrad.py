"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .base import Direction, Scalar, root


class Adagrad(Direction):
    """``s <- s + g^2;  u = g / (sqrt(s) + eps)``  (Duchi et al. 2011, diagonal form)."""

    name = "adagrad"
    states = ("sum",)

    def initial(self, group: Mapping[str, Any], state: str) -> float:
        return float(group["initial_accumulator_value"])

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["eps"]), float(group["lr_decay"])

    def rate(self, hyper: Sequence[float], t: Scalar) -> Scalar:
        return 1.0 / (1.0 + (t - 1.0) * hyper[1])

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        return (s[0] + g * g,)

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return g / (root(s[0]) + c[0])
