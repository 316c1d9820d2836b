"""SGD with a sign that does not jump."""

from __future__ import annotations

from typing import Any

from layerlr import checks
from layerlr.directions import DIRECTIONS, Direction
from layerlr.optimizer import LayerwiseOptimizer
from layerlr.options import documented


@documented
class SoftSign(LayerwiseOptimizer):
    """``m <- beta*m + (1-beta)*g;  w <- w - lr * m / (|m| + eps)``."""

    def __init__(self, params, lr=1e-3, beta=0.9, eps=1e-3, weight_decay=0.0, **layerwise) -> None:
        checks.lr(lr)
        checks.at_least_zero("beta", beta)
        checks.at_least_zero("eps", eps)
        checks.at_least_zero("weight_decay", weight_decay)
        defaults = dict(lr=lr, beta=beta, eps=eps, weight_decay=weight_decay, maximize=False)
        defaults |= dict(foreach=None, differentiable=False, fused=None, capturable=False)
        super().__init__(params, defaults, layerwise)

    def direction(self, group: dict[str, Any]) -> Direction:
        return DIRECTIONS["soft_sign"]
