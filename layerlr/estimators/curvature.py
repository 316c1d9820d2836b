"""Step sizes of `layerlr.rules.Curvature`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerlr.rules import Curvature

from .fisher import products
from .layers import Joined, generator
from .taps import Tangent
from .watch import ModelWatch

#: evaluates the closure once more, as it was evaluated for this step
Again = Callable[[], object]
#: u^T H v for each layer, of one list of tensors v
Product = Callable[[list[Tensor]], Tensor]


def estimate(
    rule: Curvature, layers: Joined, watch: ModelWatch | None, again: Again | None
) -> None:
    """Write the step sizes of all layers under one rule."""
    gs, us = layers.gradients, layers.steps
    rho, uu = layers.dot(gs, us), layers.dot(us, us)
    last = layers.read("rate")
    sizes = _sizes(rule, layers, uu)
    decay = uu * layers.of_groups(lambda h: 0.0 if h.decoupled else h.weight_decay)
    if rule.curvature in ("fisher", "exact"):
        matrix = _fisher(rule, layers, watch) if rule.curvature == "fisher" else _exact(layers)
        matrix = matrix + decay.diag()
        seen = matrix.diagonal()
        if rule.coupled:
            seen = (matrix * sizes).square().sum(1).sqrt() / sizes

        def whole(rates: Tensor) -> Tensor:
            return rates @ matrix @ rates
    else:
        if rule.curvature == "hessian":
            product = _hessian(layers)
        else:
            product = _difference(layers, watch, again)
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


def _sizes(rule: Curvature, layers: Joined, uu: Tensor) -> Tensor:
    """``((k + damping)*uu)^(-1/2)`` with the mean k so far: steps that bend the loss alike."""
    k = (layers.read("estimate") / layers.read("estimate_weight")).sqrt()
    k = torch.where(torch.isfinite(k), k, k.nanmean().nan_to_num(1.0))
    size = ((k + rule.damping) * uu).rsqrt()
    return torch.where(torch.isfinite(size), size, 1.0)


def _most(rule: Curvature, layers: Joined) -> Tensor | float:
    if rule.max_step is not None:
        return rule.max_step
    return layers.join(
        [
            torch.full_like(v.read("rate"), math.inf if v.spec.direction.first_order else 0.1)
            for v in layers.views
        ]
    )


def _signs(layers: Joined) -> Tensor:
    """A random sign for each layer."""
    draw = generator(layers.rule.seed, layers.step, layers.device)
    bits = torch.randint(0, 2, (len(layers),), generator=draw, device=layers.device)
    return 2.0 * bits.double() - 1.0


# -- products with H -----------------------------------------------------------------------------


def _ascent(layers: Joined) -> Tensor:
    return layers.of_groups(lambda h: float(h.sign))


def _hessian(layers: Joined) -> Product:
    """By a backward pass through the gradients."""
    params = layers.params()
    with_graph = [p.grad is not None and p.grad.requires_grad for p in params]
    outputs = [p.grad for p, graph in zip(params, with_graph, strict=True) if graph]
    if not outputs:
        raise RuntimeError(
            "rule 'curvature' found gradients without their graph: call "
            "loss.backward(create_graph=optimizer.is_second_order), or take "
            "Curvature('fisher') or Curvature('finite-difference')"
        )
    sign = _ascent(layers)

    def product(v: list[Tensor]) -> Tensor:
        # where a gradient has no graph the loss is linear, and its row of H is 0
        given = [x for x, graph in zip(v, with_graph, strict=True) if graph]
        given = [x.to(g.dtype) for x, g in zip(given, outputs, strict=True)]  # type: ignore
        with torch.enable_grad():
            h = torch.autograd.grad(
                outputs,  # type: ignore[arg-type]
                params,
                given,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return sign * layers.dot(layers.steps, h)

    return product


def _difference(layers: Joined, watch: ModelWatch | None, again: Again | None) -> Product:
    """From gradients at the weights and a little way along v: ``sqrt(eps)*|w|/|v|``.

    Weights, and the gradients of all parameters of the model, get their bits back.
    """
    if again is None:
        raise RuntimeError(
            "Curvature('finite-difference') evaluates the loss once more: give optimizer.step a "
            "closure, or take Curvature('hessian') or Curvature('fisher')"
        )
    assert watch is not None
    params, sign = layers.params(), _ascent(layers)
    weights = [p.detach().clone() for p in params]
    here = {p: None if p.grad is None else p.grad.detach().clone() for p in params}
    others = [p for view in layers.views for p in view.table.params]
    for p in (*watch.model.parameters(), *others):
        here.setdefault(p, None if p.grad is None else p.grad.detach().clone())
    held = [(p, p.grad, old) for p, old in here.items()]
    eps = max(torch.finfo(p.dtype).eps for p in params) ** 0.5

    def product(v: list[Tensor]) -> Tensor:
        way = eps * _norm(weights) / _norm(v)
        way = torch.where(torch.isfinite(way) & (way > 0), way, eps)
        try:
            for p, w, x in zip(params, weights, v, strict=True):
                # .data: graphs that other rules still need must not see a new version
                p.data.copy_(w + way.to(p.device, x.dtype) * x)
            for p in here:
                p.grad = None  # the closure need not clear it
            again()
            h = [
                (0.0 if p.grad is None else p.grad.detach().to(x)) - here[p].to(x)  # type: ignore
                for p, x in zip(params, v, strict=True)
            ]
        finally:
            for p, w in zip(params, weights, strict=True):
                p.data.copy_(w)
            for p, grad, old in held:
                p.grad = grad
                if grad is not None and old is not None:
                    grad.copy_(old)
        return sign * layers.dot(layers.steps, h) / way

    return product


def _norm(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double().square().sum().to(xs[0].device) for x in xs]).sum().sqrt()


# -- the whole of u_l^T H_lm u_m -----------------------------------------------------------------


def _exact(layers: Joined) -> Tensor:
    """By one product for each layer."""
    product = _hessian(layers)
    rows = len(layers)
    columns = []
    for layer in range(rows):
        only = torch.zeros(rows, dtype=torch.float64, device=layers.device)
        only[layer] = 1.0
        columns.append(product(layers.scaled(only, layers.steps)))
    return torch.stack(columns, 1)


def _fisher(rule: Curvature, layers: Joined, watch: ModelWatch | None) -> Tensor:
    """From the products of each sample."""
    assert watch is not None
    steps = {p: u for p, u in zip(layers.params(), layers.steps, strict=True)}
    tangents = []
    for p, begin, end, layer in layers.parts():
        value = steps[p].to(p.dtype)
        if p.dim() and end - begin < p.shape[0]:
            value = torch.zeros_like(p)
            value[begin:end] = steps[p][begin:end]
        tangents.append(Tangent(p, value, layer))
    draw = generator(rule.seed, layers.step, layers.device)
    with watch.replay() as (args, kwargs):
        rows = products(
            watch.model,
            args,
            kwargs,
            tangents,
            len(layers),
            rule.likelihood,
            rule.reduction,
            draw,
        ).to(layers.device)
    return rows @ rows.mT
