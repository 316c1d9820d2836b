"""Step sizes of `layerlr.rules.Curvature`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerlr.rules import Curvature

from .fisher import Tangent, fisher
from .layers import Layers, generator
from .watch import ModelWatch

#: evaluates the closure once more, as it was evaluated for this step
Again = Callable[[], object]


def estimate(
    rule: Curvature, views: Sequence[Layers], watch: ModelWatch | None, again: Again | None
) -> None:
    """Write the step sizes of all layers under one rule."""
    if rule.curvature == "fisher":
        found = _fisher(rule, views, watch)
    elif rule.curvature == "exact":
        found = _exact(views)
    else:
        signs = _signs(rule, views)
        probe = [v.scaled(s, _us(v)) for v, s in zip(views, signs, strict=True)]
        products = (
            _products(views, probe)
            if rule.curvature == "hessian"
            else _differences(views, probe, again)
        )
        found = [s * v.dot(_us(v), h) for v, s, h in zip(views, signs, products, strict=True)]
    for view, curvature in zip(views, found, strict=True):
        _write_rates(rule, view, curvature)


def _us(view: Layers) -> list[Tensor]:
    return [u for _, u in view.moves]


def _write_rates(rule: Curvature, view: Layers, along: Tensor) -> None:
    """From ``u.Hu`` of the loss as it is minimised to the rate of each layer."""
    h, us = view.hyper, _us(view)
    rho, uu = view.dot([g for g, _ in view.moves], us), view.dot(us, us)
    along = -along if h.maximize and rule.curvature != "fisher" else along
    k = along / uu + (0.0 if h.decoupled else h.weight_decay)
    good = (uu > 0) & torch.isfinite(uu) & torch.isfinite(k) & torch.isfinite(rho)
    k = view.average(k, good)
    c = (k.abs() + rule.damping) * uu
    if rule.damped:
        delta = c.sqrt()
        rate = rho / (delta * (delta + rho))
    else:
        rate = rho / c
    most = rule.max_step
    if most is None:
        most = 1.0 if view.spec.direction.first_order else 0.1
    last = view.read("rate")
    known = good & (rho > 0) & ((k > 0) | (rule.negative == "absolute"))
    fallback = torch.where(last > 0, last, rule.min_step)
    warm = min(1.0, (view.step + 1) / rule.warmup) if rule.warmup else 1.0
    rate = torch.where(known, rate.clamp(rule.min_step, most) * warm, fallback)
    view.write("rate", torch.where(uu > 0, rate, last))


# -- u.Hu, four ways -------------------------------------------------------------------------------


def _signs(rule: Curvature, views: Sequence[Layers]) -> list[Tensor]:
    """A random sign for each layer, independent over all views."""
    draws = {v.device: generator(rule.seed, v.step, v.device) for v in views}
    signs = []
    for view in views:
        shape = (len(view.table.layers),)
        bits = torch.randint(0, 2, shape, generator=draws[view.device], device=view.device)
        signs.append(2.0 * bits.double() - 1.0)
    return signs


def _products(views: Sequence[Layers], probe: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """H times the probe, by a backward pass through the gradients."""
    params = [p for view in views for p in view.params()]
    outputs, values = [], []
    for p, value in zip(params, (v for vs in probe for v in vs), strict=True):
        assert p.grad is not None
        if p.grad.requires_grad:  # else the loss is linear in it, and its row of H is 0
            outputs.append(p.grad)
            values.append(value.to(p.grad.dtype))
    if not outputs:
        raise RuntimeError(
            "rule 'curvature' found gradients without their graph: call "
            "loss.backward(create_graph=optimizer.is_second_order), or take "
            "Curvature('fisher') or Curvature('finite-difference')"
        )
    with torch.enable_grad():
        found = torch.autograd.grad(
            outputs, params, values, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return _by_view(views, list(found))


def _differences(
    views: Sequence[Layers], probe: Sequence[list[Tensor]], again: Again | None
) -> list[list[Tensor]]:
    """H times the probe, from gradients at the weights and a little way along the probe.

    The way is sqrt(eps)*|w|/|probe|, over all layers; weights and gradients get their bits back.
    """
    if again is None:
        raise RuntimeError(
            "Curvature('finite-difference') evaluates the loss once more: give optimizer.step a "
            "closure, or take Curvature('hessian') or Curvature('fisher')"
        )
    params = [p for view in views for p in view.params()]
    values = [v for vs in probe for v in vs]
    weights = [p.detach().clone() for p in params]
    grads = [(p, p.grad, p.grad.detach().clone()) for p in params if p.grad is not None]
    eps = max(torch.finfo(p.dtype).eps for p in params)
    way = eps**0.5 * _norm(weights) / _norm(values)
    way = torch.where(torch.isfinite(way) & (way > 0), way, eps**0.5)
    try:
        with torch.no_grad():
            for p, w, v in zip(params, weights, values, strict=True):
                p.copy_(w + way.to(p.device, v.dtype) * v)
        again()
        found = [
            (p.grad if p.grad is not None else torch.zeros_like(p)).detach().to(v.dtype)
            for p, v in zip(params, values, strict=True)
        ]
        found = [
            (new - old.to(new.dtype)) / way.to(new.device, new.dtype)
            for new, (_, _, old) in zip(found, grads, strict=True)
        ]
    finally:
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
            for p, grad, old in grads:
                p.grad = grad
                grad.copy_(old)
    return _by_view(views, found)


def _norm(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double().square().sum().to(xs[0].device) for x in xs]).sum().sqrt()


def _exact(views: Sequence[Layers]) -> list[Tensor]:
    """One product for each layer, every other layer's u left out."""
    zeros = [[torch.zeros_like(u) for u in _us(view)] for view in views]
    found = []
    for k, view in enumerate(views):
        along = torch.zeros(len(view.table.layers), dtype=torch.float64, device=view.device)
        for layer in {s.layer for i in view.active for s in view.table.parts[i]}:
            only = torch.zeros_like(along)
            only[layer] = 1.0
            probe = [*zeros]
            probe[k] = view.scaled(only, _us(view))
            along[layer] = view.dot(_us(view), _products(views, probe)[k])[layer]
        found.append(along)
    return found


def _fisher(rule: Curvature, views: Sequence[Layers], watch: ModelWatch | None) -> list[Tensor]:
    assert watch is not None
    tangents, sizes = [], [len(view.table.layers) for view in views]
    for k, view in enumerate(views):
        for i, u in zip(view.active, _us(view), strict=True):
            parts, p = view.table.parts[i], view.table.params[i]
            for span in parts:
                value = u.to(p.dtype)
                if len(parts) > 1:
                    value = torch.zeros_like(value)
                    value[span.begin : span.end] = u[span.begin : span.end]
                tangents.append(Tangent(p, value, sum(sizes[:k]) + span.layer))
    view = views[0]
    draw = generator(rule.seed, view.step, view.device)
    with watch.replay() as (args, kwargs):
        found = fisher(
            watch.model,
            args,
            kwargs,
            tangents,
            sum(sizes),
            rule.likelihood,
            rule.reduction,
            draw,
        )
    return [c.to(v.device) for c, v in zip(found.split(sizes), views, strict=True)]


def _by_view(views: Sequence[Layers], values: list[Tensor]) -> list[list[Tensor]]:
    rest = iter(values)
    return [[next(rest) for _ in view.active] for view in views]
