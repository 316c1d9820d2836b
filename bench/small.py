"""A few optimizers over tensors that lie back to back in memory: what checks on a GPU step with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import layerlr
from bench import shapes

#: a layer of many chunks, odd sizes, one element, no dimension, nothing at all
SMALL: tuple[tuple[int, ...], ...] = (
    *((300, 257), (64, 3, 3, 3), (64,), (90, 98), (33, 31), (7, 5), (129,), (3,), (1, 1)),
    *((1,), (), (0, 5), (2, 8192)),
)
#: more than stays on the chip of any GPU so far
LARGE = ((6151, 1031),)

# optimizer, rule, arguments
CASES: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("SGD", None, {"momentum": 0.9}),
    ("SGD", "singh", {"momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", "lars", {"momentum": 0.9}),
    ("SGD", "layca", {"momentum": 0.9}),
    ("SGD", "layca", {"momentum": 0.9, "nesterov": True}),
    ("SGD", "lamb", {}),
    ("AMomSGD", "layca", {}),
    ("Adagrad", "singh", {}),
    ("RMSprop", "layca", {"momentum": 0.5, "centered": True}),
    ("Adam", "singh", {}),
    ("Adam", "layca", {"amsgrad": True}),
    ("AdamW", None, {}),
    ("AdamW", "lamb", {}),
    ("SGD", "hyperball", {"momentum": 0.9}),
    ("AdamW", "relative", {}),
    ("SGD", "brake", {"momentum": 0.9}),
    ("Adam", "layca", {"state_dtype": "8bit"}),
    ("AdamW", None, {"state_dtype": "bfloat16"}),
)


def sizes(name: str) -> Sequence[tuple[int, ...]]:
    """Shapes by name: small, large, or a model of `bench.shapes`."""
    named = {"small": SMALL, "large": LARGE}
    return named[name] if name in named else shapes.shapes(name)


def label(name: str, rule: str | None, more: dict[str, Any]) -> str:
    return " ".join([name, rule or "no rule", *(f"{key}={value}" for key, value in more.items())])


class Buffer:
    """Weights and gradients as views of one piece of memory each, so of every alignment."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        self.shapes, self.count = shapes, sum(math.prod(s) for s in shapes)
        generator = torch.Generator(device).manual_seed(0)
        draw = {"generator": generator, "device": device}
        self.weights = torch.randn(self.count, **draw).mul_(0.02).to(dtype)
        self.grads = torch.randn(self.count, **draw).to(dtype)

    def params(self, shift: int = 0) -> list[Tensor]:
        """Fresh parameters with their gradients, ``shift`` elements further on in memory."""
        weights, grads = self._views(self.weights, shift), self._views(self.grads, shift)
        params = [torch.nn.Parameter(w) for w in weights]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return params

    def _views(self, flat: Tensor, shift: int) -> list[Tensor]:
        moved = torch.cat([flat.new_zeros(shift), flat])
        ends = itertools.accumulate((math.prod(s) for s in self.shapes), initial=shift)
        return [
            moved[i : i + math.prod(s)].view(s) for i, s in zip(ends, self.shapes, strict=False)
        ]


def step(case: tuple[str, str | None, dict[str, Any]], params: list[Tensor], backend: str, n: int):
    """Take n steps; returns the optimizer."""
    name, rule, more = case
    optimizer = getattr(layerlr, name)(params, lr=1e-2, rule=rule, backend=backend, **more)
    for _ in range(n):
        optimizer.step()
    return optimizer
