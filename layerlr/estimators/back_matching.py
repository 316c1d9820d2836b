"""Rates of `layerlr.rules.BackMatching`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerlr.rules import BackMatching

from .layers import Layers, generator
from .probe import output_tensor, probe
from .structural import Structure
from .watch import ModelWatch

_LEAST = 1e-12  # of c_W*m


def estimate(rule: BackMatching, views: Sequence[Layers], watch: ModelWatch) -> None:
    """Write the rates of all layers under one rule."""
    find = _structural if rule.estimator == "structural" else _probe
    means, known = [], []
    for view, value in zip(views, find(rule, views, watch), strict=True):
        means.append(view.average(value, torch.isfinite(value) & (value > 0)).clamp(min=_LEAST))
        known.append(torch.isfinite(means[-1]))
    unit = _unit(rule, views, means)
    for view, mean, there in zip(views, means, known, strict=True):
        rate = (unit.to(view.device) / mean).clamp(rule.min_factor, rule.max_factor)
        view.write("rate", torch.where(there, rate, 1.0))


def _unit(rule: BackMatching, views: Sequence[Layers], means: Sequence[Tensor]) -> Tensor:
    """The mean of ``c_W*m`` that gets the rate 1."""
    device = views[0].device
    governed = [
        mean[torch.tensor(view.table.ruled, device=view.device)].to(device)
        for view, mean in zip(views, means, strict=True)
    ]
    values = torch.cat(governed)
    if rule.normalize is None:
        return torch.ones((), dtype=torch.float64, device=device)
    if rule.normalize == "last":
        return values[-1].nan_to_num(1.0)
    return values.log().nanmean().exp().nan_to_num(1.0)


def _structural(rule: BackMatching, views: Sequence[Layers], watch: ModelWatch) -> list[Tensor]:
    """Mean over each layer's elements of the factors of its parameters."""
    structure = watch.once(Structure, rank=rule.dimension == "rank")
    with watch.replay() as (args, kwargs):
        factors = structure.factors(args, kwargs)
    found = []
    for view in views:
        for i, p in zip(view.active, view.params(), strict=True):
            if p not in factors:
                raise ValueError(
                    f"parameter {view.table.names[i]!r} has a gradient but no part in the attached "
                    "model's graph: attach the model that is trained, or take "
                    'BackMatching(estimator="probe")'
                )
        found.append(view.mean([factors[p] for p in view.params()]))
    return found


def _probe(rule: BackMatching, views: Sequence[Layers], watch: ModelWatch) -> list[Tensor]:
    """``||J^T v||^2/(batch*dim)`` of each layer."""
    params = [p for view in views for p in view.params()]
    draw = generator(rule.seed, views[0].step, views[0].device)
    with watch.replay() as (args, kwargs), torch.enable_grad():
        output = output_tensor(watch.model(*args, **kwargs))
        rest = iter(probe(output, params, draw))
    means = []
    for view in views:
        back = [next(rest) for _ in view.active]
        xs = [
            torch.zeros_like(p) if x is None else x
            for p, x in zip(view.params(), back, strict=True)
        ]
        means.append(view.dot(xs, xs) / (len(output) * view.count()))
    return means
