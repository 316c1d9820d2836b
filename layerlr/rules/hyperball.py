"""Hyperball: steps of a fixed relative length on a sphere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Hyperball(LayerRule):
    """``w <- R * N(w - lr*R*N(u))``, ``N(x) = x/|x|``: a step ``lr*R`` long, then back to norm R.

    In closed form, from the sums of a layer::

        s = lr*R/sqrt(uu);  k = R/sqrt(ww - 2*s*wu + s^2*uu)
        w <- k*w - k*s*u

    Parameters
    ----------
    radius
        ``"initial"``: R is the norm at the layer's first step, stored under the state key
        ``radius``. ``"current"``: the present norm. A number > 0: R of every layer, with nothing
        stored.
    start_radius
        R of a layer that starts at zero, > 0. None: the norm that torch's initialisation would have
        given it, ``sqrt(rows/3)``. Without effect where ``radius`` is a number.

    Notes
    -----
    lr is the length of the step relative to the weights, as under LAMB, and close to the angle that
    they turn by; unlike `Layca` the part of u along w is not projected out, so the angle is
    ``atan(lr)`` only where u is orthogonal to w. Decoupled weight decay is part of u.

    The norm that a layer starts with is the one it keeps: leave matrices as torch makes them. From
    GPT-2's 0.02 a narrow transformer ended 0.19 nats worse (docs/rules/hyperball.md).

    A layer of zero norm takes plain steps until its norm reaches R, as under `Layca`; where
    ``radius`` is a number, its first step puts it on the sphere, at ``-R*N(u)``.

    What is known against it: the gain is said to be the schedule of the angle that it brings, which
    can be had under any rule (arXiv:2607.22444); routers, embeddings and heads got worse under it,
    so leave them out (``adapt``, or groups without a rule); a norm taken over all experts of a
    fused tensor by mistake holds none of them: give ``split``.

    Two passes, 28 bytes per float32 parameter on SGD with momentum, 40 on Adam.

    References
    ----------
    Hyperball (AdamH, MuonH), arXiv:2606.16899. What becomes of layers that start at zero is ours.

    Examples
    --------
    >>> opt = layerlr.Adam(model.named_parameters(), lr=0.01, rule=Hyperball(radius="current"))
    """

    radius: Literal["initial", "current"] | float = "initial"
    start_radius: float | None = None

    name = "hyperball"
    plain_at_zero = True
    order = "update"
    latches = True
    sets_length = True

    def __post_init__(self) -> None:
        self._check(
            "radius",
            lambda x: x in ("initial", "current") or 0 < x < math.inf,
            "'initial', 'current' or a number > 0",
        )
        self._check_start_radius()

    @property
    def memory(self) -> Mapping[str, float]:  # type: ignore[override]
        """The radius, unless it is a number."""
        return MappingProxyType({"radius": 0.0} if isinstance(self.radius, str) else {})

    def hyper(self) -> tuple[float, ...]:
        number = 0.0 if isinstance(self.radius, str) else float(self.radius)
        return number, float(self.radius == "current")

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        norm, u = s.ww.sqrt(), s.uu.sqrt()
        radius = norm
        if self.radius == "initial":
            radius = torch.where(memory > 0, memory, norm)
        elif self.radius != "current":
            radius = constant(float(self.radius), lr)
        length = lr * radius / u
        square = s.ww - 2.0 * length * s.wu + length * length * s.uu
        moves = (u > 0) & (lr > 0) & (square > 0)
        k = radius / square.clamp(min=0.0).sqrt()
        one = constant(1.0, lr)
        a = torch.where((radius > 0) & moves, k, one)
        b = torch.where(radius > 0, torch.where(moves, -(k * length), 0.0), -lr)
        shown = torch.where(u > 0, torch.where(moves, k * radius / u, radius / u), 0.0)
        return LayerScale(one, a, b, torch.where(radius > 0, shown, one))
