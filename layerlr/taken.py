"""Steps that somebody else took: the weights before, as gradients of the weights after.

With v before and w = v - u after, the step u is v - w, the gradient v with L2 decay of -1. So the
first pass of SGD's direction measures it, and the second sets what of it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from .backends import StepConfig
from .backends.config import L2, TAKEN

#: a rate of 0 counts as this: its step is 0, and stays so
LEAST = 1e-30

#: weights and copies of them
Copies = Sequence[tuple[Tensor, Tensor]]


def copies(params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Parameters, and their weights as they are now."""
    return [(p, p.detach().clone()) for p in params]


@contextmanager
def put_back(before: Copies) -> Iterator[None]:
    """Where what is within fails, the weights are as they were; the base's state may have moved."""
    try:
        yield
    except BaseException:
        for p, v in before:
            p.detach().copy_(v)
        raise


@contextmanager
def as_gradients(before: Copies) -> Iterator[None]:
    """Within, the gradient of each parameter is its weights before the step."""
    gradients = [(p, p.grad) for p, _ in before]
    try:
        for p, v in before:
            p.grad = v
        yield
    finally:
        for p, g in gradients:
            p.grad = g


def config(rate: float | Tensor = 1.0) -> StepConfig:
    """The numbers of such a step, which the rule sees as ``rate`` times its u."""
    found = StepConfig()
    found.values[L2] = -1.0
    found.put(TAKEN, rate.clamp(min=LEAST) if isinstance(rate, Tensor) else max(rate, LEAST))
    return found
