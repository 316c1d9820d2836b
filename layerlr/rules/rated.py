"""Rates that are set from outside the step: by hand, or by looking at the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Rated(LayerRule):
    """``w <- w - lr*rate*u``: the rate of each layer is a number in its state, yours to set.

    ``optimizer.state[p]["rate"]`` is a float64 tensor on the parameter's device, 1 at first, with
    an entry for each part of the parameter that is a layer (one without ``split``). Where several
    parameters form a layer, the first one's counts. Written in place it takes effect at the next
    step, without waiting for the device; the state dict holds it. >= 0.

    `Curvature` and `BackMatching` are this rule with rates that are found by looking at the model.

    Notes
    -----
    Decoupled weight decay is scaled by the rate too. A rate of 0 leaves every bit of the layer's
    weights. Two passes, 28 bytes per float32 parameter on SGD with momentum, 40 on Adam.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule="rated")
    >>> opt.state[model[0].weight]["rate"].fill_(0.5)
    tensor([0.5000], dtype=torch.float64)
    """

    name = "rated"
    order: ClassVar[Literal["gradient", "update"]] = "update"
    adapts: ClassVar[Literal["all", "kernels"]] = "all"
    memory: ClassVar[Mapping[str, float]] = MappingProxyType({"rate": 1.0})

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        one = constant(1.0, lr)
        return LayerScale(one, one, -(lr * memory), memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimated(Rated):
    """A rule whose rates `layerlr.estimators` finds before the step, every ``refresh`` steps.

    The state holds each layer's rate (0 before the first estimate: a parameter that is unfrozen
    waits for the next one), the running mean of the number that it comes from, and the weight of
    that mean, which corrects its bias. The param-group key ``estimated`` counts the steps since the
    rule was set; with ``seed`` it determines every random draw, so that a resumed run draws what an
    uninterrupted one does, and all processes draw the same.

    Parameters
    ----------
    ema
        Weight of the past in the running mean. In [0, 1).
    refresh
        Steps from one estimate to the next. >= 1.
    seed
        Of the random signs and labels.
    """

    memory: ClassVar[Mapping[str, float]] = MappingProxyType(
        {"rate": 0.0, "estimate": 0.0, "estimate_weight": 0.0}
    )
    #: whether gradients must carry their graph where an estimate is due
    second_order: ClassVar[bool] = False

    ema: float = 0.9
    refresh: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self._check("ema", lambda x: 0.0 <= x < 1.0, "a number in [0, 1)")
        self._check("refresh", lambda x: isinstance(x, int) and x >= 1, "a whole number >= 1")
        self._check("seed", lambda x: isinstance(x, int) and x >= 0, "a whole number >= 0")

    def due(self, step: int) -> bool:
        """Whether the step of that number, from 0, begins with an estimate."""
        return step % self.refresh == 0
