"""What a layer rule is: sums over a layer in, two numbers for the layer out."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor


class LayerStats(NamedTuple):
    """Float64 sums over each layer, one entry a layer: ``w.w``, ``g.g``, ``u.u``, ``w.u``."""

    ww: Tensor
    gg: Tensor
    uu: Tensor
    wu: Tensor


class LayerScale(NamedTuple):
    """What a rule answers per layer (float64): ``u = direction(grad*g)``, ``w <- a*w + b*u``.

    ``scale`` is the rule's own number for people to read: lr times it is the effective rate.
    """

    grad: Tensor
    a: Tensor
    b: Tensor
    scale: Tensor


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """``(ww, gg, uu, wu) -> LayerScale`` for each layer.

    Subclasses are frozen dataclasses of plain values, so that a rule compares, hashes, pickles and
    travels in a state dict.

    Attributes
    ----------
    order
        ``"gradient"``: the gradient is scaled before momentum sees it (Caffe); subclasses define
        `factor`. ``"update"``: the step is scaled; subclasses define `scale`.
    measures
        Which of ``ww``, ``gg`` the first pass of a gradient rule needs.
    raw_gradient
        True where ``gg`` is taken before L2 decay is added.
    adapts
        Default of the optimizer's ``adapt=``: ``"all"`` or ``"kernels"``.
    """

    name: ClassVar[str]
    order: ClassVar[Literal["gradient", "update"]]
    measures: ClassVar[tuple[str, ...]] = ("gg",)
    raw_gradient: ClassVar[bool] = False
    adapts: ClassVar[Literal["all", "kernels"]] = "kernels"
    #: whether parameters that the rule does not govern stay where they are
    freezes: ClassVar[bool] = False
    #: whether the rule keeps each layer's first norm in the state key ``radius``
    latches: ClassVar[bool] = False

    def hyper(self) -> tuple[float, ...]:
        """Hyper-parameters in the order of the C++ function."""
        return ()

    def factor(self, s: LayerStats, lr: Tensor, weight_decay: float) -> Tensor:
        """Factor on the gradient, [layers]; ``weight_decay`` is the L2 coefficient."""
        raise NotImplementedError

    def scale(self, s: LayerStats, lr: Tensor, radius: Tensor) -> LayerScale:
        """Scale of an update rule; the sums are over ``u + weight_decay*w``, radius 0 is none."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Name and plain numbers, for a state dict."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def _check(self, name: str, value: object, ok: bool, wanted: str) -> None:
        if not ok:
            raise ValueError(f"Invalid {type(self).__name__} {name}: {value!r}, wanted {wanted}")


def constant(value: float, like: Tensor) -> Tensor:
    """``value`` for each layer."""
    return torch.full_like(like, value)
