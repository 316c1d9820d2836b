"""Rates that are set from outside the step."""

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
    """

    name = "rated"
    order: ClassVar[Literal["gradient", "update"]] = "update"
    adapts: ClassVar[Literal["all", "kernels"]] = "all"
    keeps: ClassVar[Mapping[str, float]] = MappingProxyType({"rate": 1.0})

    def scale(self, s: LayerStats, lr: Tensor, kept: Tensor) -> LayerScale:
        one = constant(1.0, lr)
        return LayerScale(one, one, -(lr * kept), kept)
