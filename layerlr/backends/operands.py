"""What a step of the reference reads and writes of one tensor, in the dtype of its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerlr import codes
from layerlr import precision as precisions
from layerlr.directions.base import Scalar

from .base import PlanSpec, accumulator
from .config import GRAD_FACTOR, L2, StepConfig


class Operands:
    """Weights, gradients and state of the tensors of a plan, complex numbers as pairs."""

    def __init__(self, spec: PlanSpec) -> None:
        self.spec = spec

    def load(self, i: int, config: StepConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, gradient and gradient with L2 decay, in the dtype of the arithmetic."""
        p = self.spec.table.params[i]
        dtype = accumulator(p.dtype)
        precision = self.precision(i)
        w = (
            precisions.load(p, self.state_dict(i), precision)
            if precision
            else _own(_real(p).to(dtype))
        )
        assert p.grad is not None
        g = _own(_real(p.grad).to(dtype))
        factor, l2 = config.get(GRAD_FACTOR), config.values[L2]
        if isinstance(factor, Tensor):
            g = g * factor.to(g)
        elif factor != 1.0:
            g = g * factor
        return w, g, g + w * l2 if l2 else g

    def precision(self, i: int) -> precisions.Precision:
        """How the weights of tensor i are stored; None: as they are."""
        return precisions.of([self.spec.table.params[i]], self.spec.precision)

    def state_dict(self, i: int) -> dict[str, Any]:
        """``optimizer.state`` of tensor i, which takes part."""
        state = self.spec.states[i]
        assert state is not None
        return state

    def state(self, i: int) -> list[Tensor]:
        """State tensors of the direction, in the dtype of the arithmetic."""
        dtype = accumulator(self.spec.table.params[i].dtype)
        state = self.state_dict(i)
        return [_own(_real(codes.load(state, k)).to(dtype)) for k in self.spec.direction.states]

    def pack(self, i: int, new: Sequence[Tensor]) -> list[codes.Packed]:
        """New state tensors of the direction as they are stored."""
        state, keys = self.state_dict(i), self.spec.direction.states
        return [codes.pack(state, key, x) for key, x in zip(keys, new, strict=True)]

    def unpack(self, i: int, packed: Sequence[codes.Packed]) -> list[Tensor]:
        """What a load finds once they are stored."""
        dtype = accumulator(self.spec.table.params[i].dtype)
        return [codes.unpack(x, dtype) for x in packed]

    def store_state(
        self, i: int, packed: Sequence[codes.Packed], skip: Tensor | None = None
    ) -> None:
        """Write the state tensors of the direction; ``skip``: leave these elements alone."""
        state = self.state_dict(i)
        for key, x in zip(self.spec.direction.states, packed, strict=True):
            codes.store(state, key, x, skip)

    def store(
        self, i: int, w: Tensor, u: Tensor, a: Tensor, b: Tensor, skip: Tensor, t: Scalar
    ) -> None:
        """``w <- a*w + b*u``; a step of zero leaves the weight's bits, the sign of a zero too."""
        p = self.spec.table.params[i]
        moved, step = w * self.spec.table.spread(i, a, w), u * self.spec.table.spread(i, b, w)
        moved = torch.where(step == 0, moved, moved + step)
        if precision := self.precision(i):
            state, split = self.state_dict(i), len(self.spec.table.parts[i]) > 1
            coded = any(codes.is_codes(state[key]) for key in self.spec.direction.states)
            places = precisions.places(p, split, coded)
            precisions.store(p, state, precision, w, moved, t, places, skip)
            return
        old = _real(p)
        new = torch.where(skip, old, moved.to(old.dtype))
        p.copy_(torch.view_as_complex(new) if p.is_complex() else new)

    def coming_step(self, i: int) -> Scalar:
        """Number of the coming step: a host number, or a device scalar under capture."""
        step = self.state_dict(i)["step"]
        return step.double() + 1.0 if step.device.type != "cpu" else step.item() + 1.0


def _real(x: Tensor) -> Tensor:
    if x._is_zerotensor():  # which stays zero whatever it is multiplied by, NaN too
        x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _own(x: Tensor) -> Tensor:
    """A copy where autograd records (differentiable=True): what it saves must not change."""
    return x.clone() if torch.is_grad_enabled() else x
