"""The rule of `layerlr.AdamMini`: the rate from one second moment a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from .rated import Rated


@dataclasses.dataclass(frozen=True)
class AdamMini(Rated):
    """``w <- w - lr*u/((1-b1^t)*(sqrt(v) + eps))``, v a running mean of ``gg/n`` of each layer.

    What `layerlr.AdamMini` does with a running mean of gradients u; it goes with no other class.
    Betas and eps are the group's.
    """

    name = kernel = "adam_mini"
    averages = True
    decays_apart = True
    memory: ClassVar[Mapping[str, float]] = MappingProxyType({"second_moment": -1.0})

    def hyper_of(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2), float(group["eps"])
