"""The numbers of a group's step, from its hyper-parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import plain_lr
from .backends import StepConfig
from .backends.config import DECOUPLED_DECAY, FOUND_INF, GRAD_FACTOR, L2, LR, PLAIN, SKIP

if TYPE_CHECKING:
    from .optimizer import LayerwiseOptimizer


def of_group(optimizer: LayerwiseOptimizer, group: dict[str, Any]) -> StepConfig:
    """All of them, but for the direction's and the rule's own."""
    rule, on_nonfinite = group["rule"], group["on_nonfinite"]
    config = StepConfig()
    values = config.values
    put_lr(config, optimizer, group["lr"])
    decay = group["weight_decay"]
    if group["corrected_decay"]:
        decay = decay * float(group["lr"]) / group["reference_lr"]
    values[DECOUPLED_DECAY if optimizer.decoupled(group) else L2] = decay
    values[SKIP] = on_nonfinite == "skip" or (on_nonfinite is None and rule is not None)
    values[PLAIN] = plain_lr.ratio(group)
    values[GRAD_FACTOR] = -1.0 if group["maximize"] else 1.0
    grad_scale = getattr(optimizer, "grad_scale", None)
    if grad_scale is not None:
        config.put(GRAD_FACTOR, values[GRAD_FACTOR] / grad_scale.double())
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        config.put(FOUND_INF, found_inf)
    return config


def put_lr(config: StepConfig, optimizer: LayerwiseOptimizer, lr: float | Tensor) -> None:
    """Set the rate, which autograd follows where the optimizer is differentiable."""
    if isinstance(lr, Tensor):
        config.put(LR, lr if optimizer.defaults["differentiable"] else lr.detach())
    else:
        config.values[LR] = lr
