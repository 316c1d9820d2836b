"""Adam and AMSGrad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Direction, Scalar, root, sqrt


class Adam(Direction):
    """``u = m_hat / (sqrt(v_hat) + eps)``  (Kingma & Ba 2015, Algorithm 1).

    ``m <- b1*m + (1-b1)*g``, ``v <- b2*v + (1-b2)*g^2``, ``m_hat = m/(1-b1^t)``,
    ``v_hat = v/(1-b2^t)``. The Lamb rule can switch the corrections off and take ``m <- b1*m + g``.
    """

    name = "adam"
    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = (float(b) for b in group["betas"])
        rule = group["rule"]
        correct = float(getattr(rule, "bias_correction", True))
        average = float(getattr(rule, "grad_averaging", True))
        return beta1, beta2, float(group["eps"]), correct, average

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        beta1, beta2, eps, correct, average, *_ = hyper
        unbias1: Scalar = 1.0 / (1.0 - beta1**t) if correct else 1.0
        unbias2: Scalar = 1.0 / sqrt(1.0 - beta2**t) if correct else 1.0
        gain = 1.0 - beta1 if average else 1.0
        return beta1, gain, beta2, 1.0 - beta2, eps, unbias1, unbias2

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        return s[0] * c[0] + g * c[1], s[1] * c[2] + (g * g) * c[3]

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        return (s[0] * c[5]) / (root(s[-1]) * c[6] + c[4])


class AmsGrad(Adam):
    """`Adam` over the largest ``v`` seen so far (Reddi et al. 2018, Algorithm 2, as in torch)."""

    name = "amsgrad"
    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        mean, square = super().advance(g, s, c)
        return mean, square, torch.maximum(s[2], square)
