"""What a direction is: the elementwise half of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = "float | Tensor"


def sqrt(x: Scalar) -> Scalar:
    """Square root of a host or device scalar."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def root(x: Tensor) -> Tensor:
    """Correctly rounded elementwise square root, which is what C++ and CUDA compute.

    torch's own root on CPU is an ulp off for 0.6% of its inputs, in float32 and in float64 alike.
    In float32 a float64 root rounded once is exact; in float64 one Newton step is, on a residual
    without rounding (Dekker's product).
    """
    if x.dtype != torch.float64:
        return x.double().sqrt().to(x.dtype)
    r = x.sqrt()
    wide = r * 134217729.0  # 2^27 + 1 splits r into halves whose products are exact
    high = wide - (wide - r)
    low = r - high
    residual = ((x - high * high) - 2.0 * high * low) - low * low
    return torch.where((r > 0) & torch.isfinite(wide), r + residual / (2.0 * r), r)


def sign(x: Tensor) -> Tensor:
    """1, 0 or -1; NaN for NaN, of which `torch.sign` makes 0."""
    return torch.where(x != x, x, x.sign())


class Direction:
    """``(g, state) -> u``, elementwise; ``u`` is the step that is subtracted.

    A direction splits into `advance` (new state) and `direction` (u from the new state), so that a
    second pass over memory can recompute u instead of storing it.

    Attributes
    ----------
    name
        The key under which C++, CUDA and Triton know the same formula.
    states
        Names of the per-element state tensors, torch.optim's own.
    nonnegative
        Those that are never below 0: sums and means of squares.
    first_order
        True where the state is linear in the gradient. A rule in gradient order then scales the
        gradient before the buffer sees it, as Caffe does; elsewhere it scales the step.
    """

    name: ClassVar[str]
    states: ClassVar[tuple[str, ...]] = ()
    nonnegative: ClassVar[tuple[str, ...]] = ("sum", "square_avg", "exp_avg_sq", "max_exp_avg_sq")
    first_order: ClassVar[bool] = False

    def initial(self, group: Mapping[str, Any], state: str) -> float:
        """Value a new state tensor is filled with."""
        return 0.0

    def hyper(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Hyper-parameters of a param group in the order of the C++ constructor."""
        return ()

    def rate(self, hyper: Sequence[float], t: Scalar) -> Scalar:
        """Factor on lr at step t (1 is the first); other than 1 for Adagrad's lr_decay alone."""
        return 1.0

    def scalars(self, hyper: Sequence[float], t: Scalar) -> tuple[Scalar, ...]:
        """Scalars of step t, formed in float64; they are rounded once, when they meet a tensor."""
        return tuple(hyper)

    def advance(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> tuple[Tensor, ...]:
        """New state from gradient ``g``, state ``s`` and `scalars` ``c``."""
        return ()

    def direction(self, g: Tensor, s: Sequence[Tensor], c: Sequence[Scalar]) -> Tensor:
        """Step ``u`` from the *new* state."""
        raise NotImplementedError
