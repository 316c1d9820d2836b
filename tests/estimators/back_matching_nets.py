"""Models whose rates back-matching finds."""

from __future__ import annotations

import torch
from torch import nn

import layerlr
from layerlr.rules import BackMatching

ESTIMATORS = ("structural", "probe")


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(step, dtype=torch.float64, n=5):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(n, 3, generator=draw, dtype=torch.float64).to(dtype)


def backward(model, step=0):
    p = next(model.parameters())
    model.zero_grad()
    loss = model(batch(step, p.dtype)).square().mean()
    loss.backward()
    return loss.item()


def train(opt, model, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        opt.step()


def make(model, *args, lr=0.05, cls=layerlr.SGD, **options):
    """An optimizer with the rule, attached; options of the rule come as ``BackMatching``'s."""
    opt = cls(model.named_parameters(), lr=lr, rule=BackMatching(*args, **options))
    opt.attach(model)
    return opt


def rates(opt, model):
    return torch.cat([opt.state[p]["rate"].cpu() for p in model.parameters()])


def factors(model, x):
    """c_W*m of each tensor of `mlp`, by hand."""
    first, _, last = model
    with torch.no_grad():
        h = torch.tanh(first(x))
        m = last.weight.square().sum() / 4 * (1 - h.square()).square().mean()
        return torch.stack([x.square().mean() * m, m, h.square().mean(), torch.tensor(1.0)])


def unit(c):
    """Rates 1/c of geometric mean 1."""
    return c.log().mean().exp() / c
