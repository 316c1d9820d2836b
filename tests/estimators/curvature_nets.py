"""Losses whose curvature is known, and steps on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr.estimators.curvature import rates as mod

D = torch.float64
#: the plain formula of each layer for itself, without guards
BARE = {"coupled": False, "damping": 0.0, "min_step": 0.0, "max_step": math.inf}


FREE = {"max_step": math.inf}  # or many a rate would be at its bound


def scalars(*values):
    return [Parameter(torch.tensor([v], dtype=D)) for v in values]


def step(opt, loss):
    opt.zero_grad()
    value = loss()
    value.backward(create_graph=opt.is_second_order)
    opt.step()
    return float(value.detach())


def kept(opt, params, key="rate"):
    return torch.cat([opt.state[p][key].cpu() for p in params])


def estimates(opt, params):
    """The running mean, its bias corrected: k, or k^2 where coupled."""
    return kept(opt, params, "estimate") / kept(opt, params, "estimate_weight")


def near(x, wanted, tolerance=1e-12):
    values = x.detach().cpu().double().flatten()
    torch.testing.assert_close(values, torch.tensor(wanted, dtype=D), rtol=tolerance, atol=0)


def signed(monkeypatch, *signs):
    """Let the random signs be these."""
    monkeypatch.setattr(
        mod, "_signs", lambda layers: torch.tensor(signs, dtype=D, device=layers.device)
    )


def mlp():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)
    x, t = torch.randn(5, 3, dtype=D), torch.tensor([0, 1, 1, 0, 1])
    return model, lambda: F.cross_entropy(model(x), t)


def descend(hessian, sizes, start, rule, steps, **options):
    """Losses over the minimum of gradient descent on a quadratic in layers of those sizes."""
    params = [Parameter(v.clone()) for v in start.split(sizes)]
    opt = layerlr.SGD(params, lr=1.0, rule=rule, **options)
    losses = []
    for _ in range(steps):
        w = torch.cat(params)
        loss = 0.5 * w @ hessian @ w
        losses.append(float(loss.detach()))
        opt.zero_grad()
        loss.backward(create_graph=True)
        opt.step()
    return torch.tensor(losses, dtype=D)
