"""RMSprop: plain, centered, with momentum, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .base import Direction, Scalar, root


class Rmsprop(Direction):
    """``v <- a*v + (1-a)*g^2;  u = g / (sqrt(v) + eps)``  (Hinton 2012, lecture 6e).

    Centered: ``r <- a*r + (1-a)*g`` and ``v - r^2`` under the root (Graves 2013).
    Momentum: ``m <- mu*m + u`` and ``u = m``.
    """

    name = "rmsprop"
    states: ClassVar[tuple[str, ...]] = ("square_avg",)
    centered = False
    momentum = False

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["alpha"]), float(group["eps"]), float(group["momentum"])

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        alpha, eps, momentum, *_ = hyper
        return alpha, 1.0 - alpha, eps, momentum

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        square = s[0] * c[0] + (g * g) * c[1]
        new = [square]
        if self.centered:
            mean = s[1] * c[0] + g * c[1]
            square = square - mean * mean
            new.append(mean)
        if self.momentum:
            new.append(s[-1] * c[3] + g / (root(square) + c[2]))
        return tuple(new)

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        if self.momentum:
            return s[-1]
        square = s[0] - s[1] * s[1] if self.centered else s[0]
        return g / (root(square) + c[2])


class RmspropCentered(Rmsprop):
    """Centered variant of `Rmsprop`."""

    name = "rmsprop_centered"
    states: ClassVar[tuple[str, ...]] = ("square_avg", "grad_avg")
    centered = True


class RmspropMomentum(Rmsprop):
    """`Rmsprop` with momentum on the normalised gradient."""

    name = "rmsprop_momentum"
    states: ClassVar[tuple[str, ...]] = ("square_avg", "momentum_buffer")
    momentum = True


class RmspropCenteredMomentum(Rmsprop):
    """Centered variant of `RmspropMomentum`."""

    name = "rmsprop_centered_momentum"
    states: ClassVar[tuple[str, ...]] = ("square_avg", "grad_avg", "momentum_buffer")
    centered = True
    momentum = True
