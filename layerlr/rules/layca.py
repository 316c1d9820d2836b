"""Layca: layer-level controlled amount of weight rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Layca(LayerRule):
    """Rotate each layer's weights by ``atan(lr)`` towards ``-u``, keeping their norm.

    The paper's four steps (project u orthogonal to w, scale it to ``|w|``, step by lr, scale back
    to the sphere) in closed form, with ``tan(phi) = lr``::

        perp = sqrt(uu - wu^2/ww);  s = R*sin(phi)/perp
        w <- (R*cos(phi)/sqrt(ww) + s*wu/ww)*w - s*u

    Parameters
    ----------
    radius
        ``"initial"``: R is the norm at the layer's first step, stored under the state key
        ``radius``, so rounding cannot drift. ``"current"``: R is the present norm, as in the
        authors' code.
    eps
        Relative size below which nothing orthogonal is left: where ``perp <= eps*|u|`` the weights
        keep their bits. >= 0.
    others
        ``"plain"``: parameters that the rule does not govern (biases, norms) take the plain step.
        ``"freeze"``: they do not move, as in the authors' code.
    max_angle
        None: phi = atan(lr), whatever the length of u. A number, radians in (0, pi]: lr is the rate
        of the direction, and phi the angle between w and w - lr*u, but no more than this (the cap
        of nGPT's training).
    start_radius
        R of a layer that starts at zero, > 0. None: the norm that torch's initialisation would have
        given it, ``sqrt(rows/3)``.

    Notes
    -----
    lr is an angle here. The authors' defaults, for hundreds of epochs: 3**-3 on SGD, Adagrad and
    RMSprop, 3**-5 on Adam and averaged momentum; short runs want more, a transformer's 2,000 steps
    2**-6 on Adam (docs/choosing.md). Decoupled weight decay is radial, so the projection removes
    it; L2 decay only enters the buffers.

    The norm that a layer starts with is the one it keeps: leave matrices as torch makes them. From
    GPT-2's 0.02 a narrow transformer ended 0.19 nats worse (docs/rules/hyperball.md).

    A layer of zero norm (a zero-initialised head, the last layer of a residual branch, LoRA's B)
    has no direction to turn. It takes plain steps until its norm reaches R, and turns from there:
    until then the state key ``radius`` holds -R.

    Two passes, 28 bytes per float32 parameter on SGD with momentum, 40 on Adam.

    References
    ----------
    Carbonnelle, De Vleeschouwer: Layer rotation: a surprisingly powerful indicator of
    generalization in deep networks?, arXiv:1806.01603, algorithm 1. The closed form and the
    relative eps are ours (the authors' code compares an absolute norm with 1e-7), and so is what
    becomes of layers that start at zero. The cap: Training nGPT, arXiv:2608.01284, from its
    abstract.

    Examples
    --------
    >>> opt = layerlr.SGD(model.named_parameters(), lr=0.1, rule=Layca(max_angle=0.05))
    """

    radius: Literal["initial", "current"] = "initial"
    eps: float = 1e-6
    others: Literal["plain", "freeze"] = "plain"
    max_angle: float | None = None
    start_radius: float | None = None

    name = "layca"
    plain_at_zero = True
    order = "update"
    latches = True
    memory: ClassVar[Mapping[str, float]] = MappingProxyType({"radius": 0.0})

    def __post_init__(self) -> None:
        self._check_choice("radius", ("initial", "current"))
        self._check_choice("others", ("plain", "freeze"))
        self._check("eps", lambda x: x >= 0, "a number >= 0")
        self._check(
            "max_angle", lambda x: x is None or 0 < x <= math.pi, "None or radians in (0, pi]"
        )
        self._check_start_radius()

    @property
    def freezes(self) -> bool:  # type: ignore[override]
        """Whether parameters outside the layers stay where they are."""
        return self.others == "freeze"

    @property
    def sets_length(self) -> bool:  # type: ignore[override]
        """Unless the angle may be that of the direction's own step."""
        return self.max_angle is None

    def hyper(self) -> tuple[float, ...]:
        cap = self.max_angle
        sides = (2.0, 0.0) if cap is None else (math.cos(cap), math.sin(cap))
        return float(self.eps), *sides, float(self.radius == "current")

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        norm = s.ww.sqrt()
        perp2 = s.uu - s.wu * s.wu / s.ww
        perp = perp2.clamp(min=0.0).sqrt()
        turns = (norm > 0) & (perp2 > self.eps * self.eps * s.uu)
        radius = torch.where(memory > 0, memory, norm) if self.radius == "initial" else norm
        one = constant(1.0, lr)
        along, across = one, lr
        if self.max_angle is not None:
            along, across = norm - lr * s.wu / norm, lr * perp
        side = (along * along + across * across).sqrt()
        cosine, sine = along / side, across / side
        if self.max_angle is not None:
            beyond = cosine < math.cos(self.max_angle)
            cosine = torch.where(beyond, math.cos(self.max_angle), cosine)
            sine = torch.where(beyond, math.sin(self.max_angle), sine)
        step = sine * radius / perp
        moves = turns & (lr > 0)
        a = torch.where(moves, cosine * (radius / norm) + step * s.wu / s.ww, one)
        b = torch.where(norm > 0, torch.where(moves, -step, 0.0), -lr)
        shown = torch.where(turns, torch.where(lr > 0, step / lr, radius / perp), 0.0)
        return LayerScale(one, a, b, torch.where(norm > 0, shown, one))
