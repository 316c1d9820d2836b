"""Step sizes of `layerlr.rules.Curvature`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerlr.backends.config import L2
from layerlr.estimators.layers import LayerSet, generator
from layerlr.estimators.replay import ModelReplay
from layerlr.rules import Curvature

from . import hessian
from .hessian import Product

if TYPE_CHECKING:
    from .finite_difference import Again


def estimate(
    rule: Curvature, layers: LayerSet, model: ModelReplay | None, again: Again | None
) -> None:
    """Write the step sizes of all layers under one rule."""
    gs, us = layers.gradients, layers.steps
    rho, uu = layers.dot(gs, us), layers.dot(us, us)
    last = layers.read("rate")
    sizes = _sizes(rule, layers, uu)
    decay = uu * layers.of_groups(lambda config: config.values[L2])
    if rule.curvature in ("fisher", "exact"):
        matrix = _matrix(rule, layers, model) + decay.diag()
        seen = matrix.diagonal()
        if rule.coupled:
            seen = (matrix * sizes).square().sum(1).sqrt() / sizes

        def whole(rates: Tensor) -> Tensor:
            return rates @ matrix @ rates
    else:
        product = _product(rule, layers, model, again)
        signs = _signs(layers)
        weights = signs * (sizes if rule.coupled else 1.0)
        seen = product(layers.scaled(weights, us)) / weights + decay

        def whole(rates: Tensor) -> Tensor:
            return rates @ (product(layers.scaled(rates, us)) + rates * decay)

    k = seen / uu
    moves = torch.isfinite(rho) & torch.isfinite(uu) & (uu > 0)
    usable = moves & torch.isfinite(k)
    trusted = usable & ((k > 0) | (rule.negative == "absolute"))
    if rule.coupled:  # signs make the other layers' share a random one: it adds up in squares
        mean = layers.average(k.square(), trusted).sqrt()
    else:
        mean = layers.average(k, trusted).abs()
    c = (mean + rule.damping) * uu
    if rule.damped:
        delta = c.sqrt()
        rate = rho / (delta * (delta + rho))
    else:
        rate = rho / c
    rate = rate.clamp(max=_most(rule, layers)).clamp(min=rule.min_step)
    fresh = trusted & (rho > 0) & torch.isfinite(rate)
    rate = torch.where(fresh, rate, torch.where(last > 0, last, rule.min_step))
    if rule.coupled:
        tried = torch.where(usable, rate, 0.0)
        bend = whole(tried)
        if rule.negative == "absolute":
            bend = bend.abs()
        bend = bend + rule.damping * (tried.square() * uu).nansum()
        slope = (tried * rho).nansum()
        over = torch.where((slope > 0) & torch.isfinite(bend), bend / slope, 1.0)
        rate = rate / over.clamp(min=1.0)
    if rule.warmup:  # the last rate has had its share of it
        part = min(1.0, (layers.step + 1) / rule.warmup)
        rate = torch.where(fresh, rate * part, rate)
    layers.write("rate", torch.where(moves, rate, last))


def _sizes(rule: Curvature, layers: LayerSet, uu: Tensor) -> Tensor:
    """``((k + damping)*uu)^(-1/2)`` with the mean k so far: steps that bend the loss alike."""
    k = (layers.read("estimate") / layers.read("estimate_weight")).sqrt()
    k = torch.where(torch.isfinite(k), k, k.nanmean().nan_to_num(1.0))
    size = ((k + rule.damping) * uu).rsqrt()
    return torch.where(torch.isfinite(size), size, 1.0)


def _most(rule: Curvature, layers: LayerSet) -> Tensor | float:
    if rule.max_step is not None:
        return rule.max_step
    return layers.join(
        [
            torch.full_like(v.read("rate"), math.inf if v.spec.direction.first_order else 0.1)
            for v in layers.views
        ]
    )


def _signs(layers: LayerSet) -> Tensor:
    """A random sign for each layer."""
    draw = generator(layers.rule.seed, layers.step, layers.device)
    bits = torch.randint(0, 2, (len(layers),), generator=draw, device=layers.device)
    return 2.0 * bits.double() - 1.0


def _product(
    rule: Curvature, layers: LayerSet, model: ModelReplay | None, again: Again | None
) -> Product:
    if rule.curvature == "hessian":
        return hessian.product(layers)
    from . import finite_difference

    assert model is not None
    return finite_difference.product(layers, model, again)


def _matrix(rule: Curvature, layers: LayerSet, model: ModelReplay | None) -> Tensor:
    if rule.curvature == "exact":
        return hessian.matrix(layers)
    from . import fisher

    assert model is not None
    return fisher.matrix(rule, layers, model)
