"""Layca: layer-level controlled amount of weight rotation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from .base import LayerRule, LayerScale, LayerStats, constant


@dataclasses.dataclass(frozen=True)
class Layca(LayerRule):
    """Rotate each layer's weights by ``atan(lr)`` towards ``-u``, keeping their norm.

    The paper's four steps (project u orthogonal to w, scale it to ``|w|``, step by lr, scale back
    to the sphere) in closed form::

        perp = sqrt(uu - wu^2/ww);  c = lr*sqrt(ww)/perp;  k = R / (sqrt(ww)*sqrt(1 + lr^2))
        w <- k*(1 + c*wu/ww)*w - k*c*u

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

    Notes
    -----
    lr is an angle here: 3**-3 suits SGD, Adagrad and RMSprop, 3**-5 Adam and averaged momentum
    (the authors' defaults). Decoupled weight decay is radial, so the projection removes it; L2
    decay only enters the buffers. Layers of zero norm take the plain step. Two passes, 28 bytes
    per float32 parameter on SGD with momentum, 40 on Adam.

    References
    ----------
    Carbonnelle, De Vleeschouwer: Layer rotation: a surprisingly powerful indicator of
    generalization in deep networks?, arXiv:1806.01603, algorithm 1. The closed form and the
    relative eps are ours (the authors' code compares an absolute norm with 1e-7).
    """

    radius: Literal["initial", "current"] = "initial"
    eps: float = 1e-6
    others: Literal["plain", "freeze"] = "plain"

    name = "layca"
    order = "update"
    latches = True

    def __post_init__(self) -> None:
        for name, ok in (("radius", ("initial", "current")), ("others", ("plain", "freeze"))):
            value = getattr(self, name)
            self._check(name, value, value in ok, f"{ok[0]!r} or {ok[1]!r}")
        self._check("eps", self.eps, self.eps >= 0, "a number >= 0")

    @property
    def freezes(self) -> bool:  # type: ignore[override]
        """Whether parameters outside the layers stay where they are."""
        return self.others == "freeze"

    @property
    def memory(self) -> dict[str, float]:  # type: ignore[override]
        """The radius, unless it is the present norm."""
        return {"radius": 0.0} if self.radius == "initial" else {}

    def hyper(self) -> tuple[float, ...]:
        return (float(self.eps),)

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        norm = s.ww.sqrt()
        perp2 = s.uu - s.wu * s.wu / s.ww
        perp = perp2.clamp(min=0.0).sqrt()
        rotates = (norm > 0) & (perp2 > self.eps * self.eps * s.uu)
        cos = 1.0 / (1.0 + lr * lr).sqrt()
        k = cos * torch.where(memory > 0, memory / norm, 1.0)
        c = lr * norm / perp
        one = constant(1.0, lr)
        a = torch.where(rotates & (lr > 0), k * (1.0 + c * s.wu / s.ww), one)
        b = torch.where(rotates & (lr > 0), -(k * c), 0.0)
        b = torch.where(norm > 0, b, -lr)
        scale = torch.where(norm > 0, torch.where(rotates, k * norm / perp, 0.0), one)
        return LayerScale(one, a, b, scale)
