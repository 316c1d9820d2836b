"""Networks, and the products of their Jacobians with what is drawn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from layerlr.estimators.curvature import fisher as mod
from layerlr.estimators.curvature.fisher import products
from layerlr.estimators.curvature.module_products import Tangent

N = 3


class Wrap(nn.Module):
    """A model from a function of its modules and the input."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._f = forward

    def forward(self, *args, **kwargs):
        return self._f(self, *args, **kwargs)


class Scale(nn.Module):
    """Owns a parameter outside torch.nn, draws random numbers, counts its calls."""

    def __init__(self, n, p=0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, n))
        self.p = p
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return F.dropout(torch.tanh(x * self.gain), self.p, self.training)


def chain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def vectors(*shape):
    return lambda: torch.randn(N, *shape)


def tokens():
    return torch.randint(6, (N, 2))


def each(model, key=lambda i, name: i):
    """A random direction for each parameter, in layers by key."""
    return [
        Tangent(p, torch.randn_like(p), key(i, name))
        for i, (name, p) in enumerate(model.named_parameters())
    ]


def run(model, args, tangents, likelihood="categorical", reduction="mean", seed=0, kwargs=None):
    layers = max(t.layer for t in tangents) + 1
    generator = torch.Generator().manual_seed(seed)
    found = products(model, args, kwargs or {}, tangents, layers, likelihood, reduction, generator)
    return found.square().sum(1)


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def along(model, args, tangents):
    """J d for each layer by an explicit Jacobian in reverse mode: [layers, *output]."""
    names = {id(p): name for name, p in model.named_parameters()}
    params = {name: p.detach() for name, p in model.named_parameters()}
    jac = torch.func.jacrev(lambda q: functional_call(model, {**q, **buffers(model)}, args))(params)
    out = model(*args).detach()
    result = torch.zeros(max(t.layer for t in tangents) + 1, *out.shape)
    for t in tangents:
        j = jac[names[id(t.param)]].flatten(out.dim())
        result[t.layer] += (j * t.value.flatten()).sum(-1)
    return result


def fixed(monkeypatch, r):
    """Make r the gradient in the output."""
    monkeypatch.setattr(mod, "_residual", lambda *_: r)


def check(model, args, tangents, monkeypatch, rtol=1e-10):
    """One draw against (r_i . J_i d)^2."""
    jd = along(model, args, tangents)
    r = torch.randn(jd.shape[1:])
    fixed(monkeypatch, r)
    wanted = (jd * r).flatten(2).sum(2).square().sum(1)
    found = run(model, args, tangents, reduction="sum")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-14)
    assert (wanted > 0).all()


def by_graph(out, r, tangents):
    """Sum of s_i^2 for a layer to each tangent, one sample at a time through out's graph."""
    total = torch.zeros(len(tangents))
    for i in range(len(out)):
        params = [t.param for t in tangents]
        grads = torch.autograd.grad((out[i] * r[i]).sum(), params, retain_graph=True)
        total += torch.stack([(g * t.value).sum() for g, t in zip(grads, tangents)]) ** 2
    return total


class Square(torch.autograd.Function):
    """Without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Squared(Scale):
    def __init__(self, n, square):
        super().__init__(n)
        self.square = square

    def forward(self, x):
        return self.square.apply(x * self.gain)
