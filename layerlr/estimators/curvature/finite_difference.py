"""Products with the Hessian, from gradients a little way along the direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from layerlr.estimators.layers import LayerSet
from layerlr.estimators.replay import ModelReplay

from .hessian import Product, ascent

#: evaluates the closure once more, as it was evaluated for this step
Again: TypeAlias = Callable[[], object]


def product(layers: LayerSet, model: ModelReplay, again: Again | None) -> Product:
    """``v -> u^T H v`` from gradients at the weights and at ``sqrt(eps)*|w|/|v|`` along v.

    Weights, and the gradients of all parameters of the model, get their bits back.
    """
    if again is None:
        raise RuntimeError(
            "Curvature('finite-difference') evaluates the loss once more: give optimizer.step a "
            "closure, or take Curvature('hessian') or Curvature('fisher')"
        )
    params, sign = layers.params(), ascent(layers)
    weights = [p.detach().clone() for p in params]
    before = {p: None if p.grad is None else p.grad.detach().clone() for p in params}
    others = [p for view in layers.views for p in view.table.params]
    for p in (*model.model.parameters(), *others):
        before.setdefault(p, None if p.grad is None else p.grad.detach().clone())
    gradients = [(p, p.grad, old) for p, old in before.items()]
    eps = max(torch.finfo(p.dtype).eps for p in params) ** 0.5

    def along(v: list[Tensor]) -> Tensor:
        way = eps * _norm(weights) / _norm(v)
        way = torch.where(torch.isfinite(way) & (way > 0), way, eps)
        try:
            for p, w, x in zip(params, weights, v, strict=True):
                # .data: graphs that other rules still need must not see a new version
                p.data.copy_(w + way.to(p.device, x.dtype) * x)
            for p in before:
                p.grad = None  # the closure need not clear it
            again()
            h = [
                (0.0 if p.grad is None else p.grad.detach().to(x)) - before[p].to(x)  # type: ignore
                for p, x in zip(params, v, strict=True)
            ]
        finally:
            for p, w in zip(params, weights, strict=True):
                p.data.copy_(w)
            for p, grad, old in gradients:
                p.grad = grad
                if grad is not None and old is not None:
                    grad.copy_(old)
        return sign * layers.dot(layers.steps, h) / way

    return along


def _norm(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double().square().sum().to(xs[0].device) for x in xs]).sum().sqrt()
