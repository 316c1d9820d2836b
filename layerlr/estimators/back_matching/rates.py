"""Rates of `layerlr.rules.BackMatching`."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlr.estimators.layers import LayerSet, generator
from layerlr.estimators.replay import ModelReplay, output_tensor
from layerlr.rules import BackMatching

from .probe import probe

_LEAST = 1e-12  # of c_W*m
_NOISE = 1e-10  # of the largest c_W*m: rounding of what is 0 (a bias before a batch norm)


def estimate(rule: BackMatching, layers: LayerSet, model: ModelReplay) -> None:
    """Write the rates of all layers under one rule."""
    find = _structural if rule.estimator == "structural" else _probe
    value = find(rule, layers, model)
    finite = torch.isfinite(value)
    most = torch.where(finite, value, 0.0).max()
    mean = layers.average(value, finite & (value > _NOISE * most)).clamp(min=_LEAST)
    known = torch.isfinite(mean)
    middle = mean.log().nanmean().exp()
    unit = torch.ones_like(middle)
    if rule.normalize == "mean":
        unit = middle
    elif rule.normalize == "last":
        unit = mean[known.cumsum(0).argmax()]
    rate = unit / torch.where(known, mean, middle)
    rate = torch.where(known.any(), rate, 1.0)
    layers.write("rate", rate.clamp(rule.min_factor, rule.max_factor))


def _structural(rule: BackMatching, layers: LayerSet, model: ModelReplay) -> Tensor:
    """Mean over each layer's elements of the factors of its parameters."""
    from .structural import Structure

    with model.replay() as (args, kwargs):
        structure = model.once(Structure, rank=rule.dimension == "rank")  # runs forward too
        factors = structure.factors(args, kwargs)
    for p, name in zip(layers.params(), layers.names(), strict=True):
        if p not in factors:
            raise ValueError(
                f"parameter {name!r} has a gradient but no part in the attached model's graph: "
                'attach the model that is trained, or take BackMatching(estimator="probe")'
            )
    return layers.mean([factors[p] for p in layers.params()])


def _probe(rule: BackMatching, layers: LayerSet, model: ModelReplay) -> Tensor:
    """``||J^T v||^2/(batch*dim)`` of each layer."""
    params = layers.params()
    draw = generator(rule.seed, layers.step, layers.device)
    with model.replay() as (args, kwargs), torch.enable_grad():
        output = output_tensor(model.model(*args, **kwargs))
        found = probe(output, params, draw)
    back = [torch.zeros_like(p) if x is None else x for p, x in zip(params, found, strict=True)]
    return layers.dot(back, back) / (len(output) * layers.count())
