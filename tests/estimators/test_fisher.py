"""Curvature from drawn labels: each draw against explicit Jacobians, their mean against F."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fisher_nets import N, Wrap, along, chain, check, each, fixed, run, tokens, vectors
from torch import nn

from layerlr.estimators.curvature import fisher as mod
from layerlr.estimators.curvature import module_products
from layerlr.estimators.curvature.module_products import Tangent


def conv():
    bn = nn.BatchNorm2d(2)
    bn.running_mean.uniform_(-0.5, 0.5)
    bn.running_var.uniform_(0.5, 2.0)
    bn.weight.data.uniform_(0.5, 2.0)
    parts = nn.Conv2d(1, 2, 2), bn, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*parts).eval()


def embedding():
    parts = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*parts)


def positions():
    """Output [N, C, T]."""
    return nn.Sequential(nn.Conv1d(4, 3, 2, bias=True), nn.GroupNorm(1, 3), nn.PReLU(3))


NETS = {
    "chain": (chain, vectors(4)),
    "conv": (conv, vectors(1, 3, 3)),
    "embedding": (embedding, tokens),
    "positions": (positions, vectors(4, 3)),
}


pytestmark = pytest.mark.usefixtures("float64_by_default")


def loss(out, likelihood, reduction):
    how = "sum" if reduction == "batchmean" else reduction
    if likelihood == "categorical":
        labels = torch.zeros(out.shape[:1] + out.shape[2:], dtype=torch.long)
        value = F.cross_entropy(out, labels, reduction=how)
    else:
        target = torch.full_like(out, 0.25)
        losses = {"bernoulli": F.binary_cross_entropy_with_logits, "gaussian": F.mse_loss}
        value = losses[likelihood](out, target, reduction=how)
    return value / len(out) if reduction == "batchmean" else value


def exact(model, args, tangents, likelihood, reduction):
    """d^T J^T H J d with H the Hessian of the user's loss in the output (of any target)."""
    out = model(*args).detach()
    h = torch.func.hessian(lambda y: loss(y, likelihood, reduction))(out)
    h = h.reshape(out.numel(), -1)
    jd = along(model, args, tangents).flatten(1)
    return torch.einsum("li,ij,lj->l", jd, h, jd)


ALL = list(
    itertools.product(("categorical", "bernoulli", "gaussian"), ("mean", "batchmean", "sum"))
)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("plain", [True, False])
def test_products(net, plain, monkeypatch):
    if not plain:  # forward mode gives the same
        monkeypatch.setattr(module_products, "LAST", ())
        monkeypatch.setattr(module_products, "CHANNELS", ())
    model, data = NETS[net][0](), NETS[net][1]()
    check(model, (data,), each(model), monkeypatch)
    check(model, (data,), each(model, lambda i, name: i // 2), monkeypatch)


@pytest.mark.parametrize("likelihood, reduction", ALL)
@pytest.mark.parametrize("net", NETS)
def test_mean_of_draws(net, likelihood, reduction):
    """Within 5 standard errors; 60 draws of 3 samples, and no more than 30% apart from it."""
    model, data = NETS[net][0](), NETS[net][1]()
    tangents = each(model, lambda i, name: i // 2)
    wanted = exact(model, (data,), tangents, likelihood, reduction)
    draws = torch.stack(
        [run(model, (data,), tangents, likelihood, reduction, seed) for seed in range(60)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - wanted).abs() < 5 * error).all()
    assert (error < 0.25 * wanted).all()  # the bound above says something


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_moments_of_the_residual(likelihood):
    """Mean 0 and the loss's Hessian for covariance, within 5 standard errors of 40000 draws."""
    logits = torch.tensor([[1.0, -0.5, 0.3]])
    n = 40000
    r = mod._residual(logits.expand(n, 3), likelihood, torch.Generator().manual_seed(0))
    h = torch.func.hessian(lambda y: loss(y, likelihood, "sum"))(logits).reshape(3, 3)
    products = r[:, :, None] * r[:, None, :]
    for found, wanted in ((r, torch.zeros(3)), (products, h)):
        error = found.std(0) / n**0.5
        assert ((found.mean(0) - wanted).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residual_keeps_the_dtype(dtype):
    x = torch.randn(4, 3).to(dtype)
    for likelihood in ("categorical", "bernoulli", "gaussian"):
        r = mod._residual(x, likelihood, torch.Generator().manual_seed(0))
        assert r.dtype == dtype and r.shape == x.shape and r.isfinite().all()


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_categorical_by_enumeration(shape, reduction, monkeypatch):
    """All labels of one sample by their probabilities: exact."""
    model = nn.Sequential(nn.Linear(4, 3 * (2 if shape else 1)), nn.Unflatten(1, (3, *shape)))
    args = (torch.randn(1, 4),)
    tangents = each(model)
    p = model(*args).softmax(1).detach().reshape(3, -1)
    total = torch.zeros(2)
    for labels in itertools.product(range(3), repeat=p.shape[1]):
        drawn = torch.tensor(labels).reshape(1, *shape)
        monkeypatch.setattr(mod, "_draw", lambda q, generator, drawn=drawn: drawn)
        weight = torch.stack([p[c, i] for i, c in enumerate(labels)]).prod()
        total += weight * run(model, args, tangents, reduction=reduction)
    wanted = exact(model, args, tangents, "categorical", reduction)
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_reductions_are_multiples(likelihood):
    model, data = positions(), torch.randn(N, 4, 3)
    tangents = each(model)
    found = {
        how: run(model, (data,), tangents, likelihood, how, seed=1)
        for how in ("mean", "batchmean", "sum")
    }
    terms = N * 2 * (1 if likelihood == "categorical" else 3)
    torch.testing.assert_close(found["sum"], found["mean"] * terms)
    torch.testing.assert_close(found["sum"], found["batchmean"] * N)


def test_parameters_of_a_layer_add_up_before_the_square(monkeypatch):
    model, args = chain(), (torch.randn(N, 4),)
    r = torch.randn(N, 3)
    fixed(monkeypatch, r)
    apart = each(model)
    joined = [t._replace(layer=0) for t in apart]
    s = (along(model, args, apart) * r).sum(2)
    found = run(model, args, joined, reduction="sum")
    torch.testing.assert_close(found, s.sum(0).square().sum().reshape(1))
    assert not torch.allclose(found, run(model, args, apart, reduction="sum").sum())


def test_split_layers(monkeypatch):
    model, args = chain(), (torch.randn(N, 4),)
    tangents = []
    for layer, rows in enumerate((slice(0, 2), slice(2, 5))):
        for p in (model[0].weight, model[0].bias):
            value = torch.zeros_like(p)
            value[rows] = torch.randn_like(value[rows])
            tangents.append(Tangent(p, value, layer))
    check(model, args, tangents, monkeypatch)


def test_several_tangents_of_a_layer_for_one_parameter(monkeypatch):
    model, args = chain(), (torch.randn(N, 4),)
    tangents = [Tangent(model[0].weight, torch.randn(5, 4), 0) for _ in range(2)]
    check(model, args, tangents, monkeypatch)


def test_layers_that_do_not_take_part():
    model = Wrap(lambda m, x: m.a(x), a=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    tangents = each(model, lambda i, name: 3 * i)
    found = run(model, (torch.randn(N, 4),), tangents)
    assert ((found > 0) == torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]).bool()).all()
