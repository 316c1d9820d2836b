"""Rates of `layerlr.rules.BackMatching`."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlr.rules import BackMatching

from .layers import Joined, generator
from .probe import output_tensor, probe
from .structural import Structure
from .watch import ModelWatch

_LEAST = 1e-12  # of c_W*m


def estimate(rule: BackMatching, layers: Joined, watch: ModelWatch) -> None:
    """Write the rates of all layers under one rule."""
    find = _structural if rule.estimator == "structural" else _probe
    value = find(rule, layers, watch)
    mean = layers.average(value, torch.isfinite(value)).clamp(min=_LEAST)
    rate = (_unit(rule, mean) / mean).clamp(rule.min_factor, rule.max_factor)
    layers.write("rate", torch.where(torch.isfinite(mean), rate, layers.read("rate")))


def _unit(rule: BackMatching, mean: Tensor) -> Tensor:
    """The ``c_W*m`` that gets the rate 1; layers without any (and without a gradient) are NaN."""
    if rule.normalize is None:
        return torch.ones_like(mean[0])
    if rule.normalize == "last":
        last = torch.isfinite(mean).cumsum(0).argmax()
        return mean[last]
    return mean.log().nanmean().exp()


def _structural(rule: BackMatching, layers: Joined, watch: ModelWatch) -> Tensor:
    """Mean over each layer's elements of the factors of its parameters."""
    structure = watch.once(Structure, rank=rule.dimension == "rank")
    with watch.replay() as (args, kwargs):
        factors = structure.factors(args, kwargs)
    for p, name in zip(layers.params(), layers.names(), strict=True):
        if p not in factors:
            raise ValueError(
                f"parameter {name!r} has a gradient but no part in the attached model's graph: "
                'attach the model that is trained, or take BackMatching(estimator="probe")'
            )
    return layers.mean([factors[p] for p in layers.params()])


def _probe(rule: BackMatching, layers: Joined, watch: ModelWatch) -> Tensor:
    """``||J^T v||^2/(batch*dim)`` of each layer."""
    params = layers.params()
    draw = generator(rule.seed, layers.step, layers.device)
    with watch.replay() as (args, kwargs), torch.enable_grad():
        output = output_tensor(watch.model(*args, **kwargs))
        found = probe(output, params, draw)
    back = [torch.zeros_like(p) if x is None else x for p, x in zip(params, found, strict=True)]
    return layers.dot(back, back) / (len(output) * layers.count())
