"""Plain, heavy-ball, Nesterov and averaged momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .base import Direction, Scalar


class Sgd(Direction):
    """``u = g``."""

    name = "sgd"
    first_order = True

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return g


class Momentum(Direction):
    """``m <- mu*m + (1 - dampening)*g;  u = m``; the first step is not dampened (as in torch)."""

    name = "momentum"
    states = ("momentum_buffer",)
    first_order = True

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return float(group["momentum"]), float(group["dampening"])

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        mu, dampening, *_ = hyper
        first = t == 1
        # a host scalar, or 0/1 on the device: no synchronisation either way
        return mu, 1.0 if first is True else (1.0 - dampening) + dampening * first

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        return (s[0] * c[0] + g * c[1],)

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return s[0]


class Nesterov(Momentum):
    """``m <- mu*m + g;  u = g + mu*m`` (torch), equal to Caffe's ``(1 + mu)*m - mu*m_old``."""

    name = "nesterov"

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return g + s[0] * c[0]


class AveragedMomentum(Momentum):
    """``m <- mu*m + (1 - mu)*g;  u = m``, without bias correction (SGD_AMom of the Layca paper)."""

    name = "averaged_momentum"

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return (float(group["momentum"]),)

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        return hyper[0], 1.0 - hyper[0]


class FirstMoment(AveragedMomentum):
    """The same, with Adam's names for mu and m: beta1 and ``exp_avg``."""

    states = ("exp_avg",)

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return (float(group["betas"][0]),)
