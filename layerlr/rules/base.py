"""What a layer rule is: sums over a layer in, two numbers for the layer out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from layerlr.conditions import holds, plain_value


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
    measures_ww
        True where a gradient rule needs ``ww`` of its first pass, beside ``gg``.
    raw_gradient
        True where ``gg`` is taken before L2 decay is added.
    adapts
        Default of the optimizer's ``adapt=``: ``"all"`` or ``"kernels"``.
    """

    name: ClassVar[str]
    order: ClassVar[Literal["gradient", "update"]]
    measures_ww: ClassVar[bool] = False
    raw_gradient: ClassVar[bool] = False
    adapts: ClassVar[Literal["all", "kernels"]] = "kernels"
    #: whether parameters that the rule does not govern stay where they are
    freezes: ClassVar[bool] = False
    #: state keys of the float64 numbers that the rule stores for each layer, and their first
    #: values; engines read the first of them
    memory: ClassVar[Mapping[str, float]] = MappingProxyType({})
    #: whether that number is the layer's radius: the norm of its weights at its first step. A layer
    #: that starts at zero has minus `start_radius` there and takes plain steps until its norm
    #: reaches it (None: the norm that torch's initialisation would have given it)
    latches: ClassVar[bool] = False
    start_radius = None  # type: float | None  # an annotation would put it first among the fields
    #: whether the step has the same length whatever the length of u
    sets_length: ClassVar[bool] = False
    #: whether decoupled weight decay is no part of the step that the rule sees
    decays_apart: ClassVar[bool] = False
    #: whether that number is a running mean of ``gg/n`` (below 0: none yet), n being the number of
    #: the layer's weights, from which its rate follows: Adam's second moment of a whole layer
    averages: ClassVar[bool] = False
    #: whether a layer of zeros takes the plain step, at ``plain_lr``: nothing can be relative to it
    plain_at_zero: ClassVar[bool] = False
    #: name under which the engines know the formula, where it is another's
    kernel: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__ and not hasattr(cls, "kernel"):
            cls.kernel = cls.name

    @property
    def memory_key(self) -> str | None:
        """State key of the number that engines read."""
        return next(iter(self.memory), None)

    def hyper(self) -> tuple[float, ...]:
        """Hyper-parameters in the order of the C++ function."""
        return ()

    def hyper_of(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Hyper-parameters of a step, some of which may be its group's."""
        return self.hyper()

    def factor(self, s: LayerStats, lr: Tensor, weight_decay: float) -> Tensor:
        """Factor on the gradient, [layers]; ``weight_decay`` is the L2 coefficient."""
        raise NotImplementedError

    def scale(self, s: LayerStats, lr: Tensor, memory: Tensor) -> LayerScale:
        """Scale of an update rule; the sums are over ``u + weight_decay*w``, memory 0 is none."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Name and plain numbers, for a state dict."""
        values = {key: plain_value(value) for key, value in dataclasses.asdict(self).items()}
        return {"name": self.name, **values}

    def _check(self, name: str, condition: Callable[[Any], Any], wanted: str) -> None:
        """Refuse a hyper-parameter of which the condition does not hold."""
        value = getattr(self, name)
        if not holds(condition, value):
            raise ValueError(f"Invalid {type(self).__name__} {name}: {value!r}, wanted {wanted}")

    def _check_choice(self, name: str, known: Sequence[object]) -> None:
        """Refuse what is none of the known."""
        *others, last = map(repr, known)
        self._check(name, lambda x: x in known, f"{', '.join(others)} or {last}")

    def _check_start_radius(self) -> None:
        self._check("start_radius", lambda x: x is None or x > 0, "None or a number > 0")


def constant(value: float, like: Tensor) -> Tensor:
    """``value`` for each layer."""
    return torch.full_like(like, value)
