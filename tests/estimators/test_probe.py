"""Back-matching by probe against traces of explicit Jacobians."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch import nn
from torch.func import functional_call

from layerlr.estimators.back_matching import probe as mod
from layerlr.estimators.back_matching.probe import probe
from layerlr.estimators.replay import output_tensor


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def traces(model, data):
    """trace(J^T J) for each parameter, J over all samples' outputs."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def forward(q):
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, {**q, **buffers}, (data,))

    jac = torch.func.jacrev(forward)(params)
    return torch.stack([j.square().sum() for j in jac.values()])


def estimate(model, data, seed):
    generator = torch.Generator().manual_seed(seed)
    found = probe(model(data), list(model.parameters()), generator)
    return torch.stack([p.square().sum() for p in found])


def paper():
    """The vector of section 4: W2 W1 x with 2 samples."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
    model[1].weight.data = torch.tensor([[2.0, -1.0]])
    return model, torch.tensor([[1.0, 0.0], [2.0, 1.0]])


def enumerate_signs(model, data, monkeypatch):
    out = model(data)
    total = 0
    patterns = list(itertools.product((-1.0, 1.0), repeat=out.numel()))
    for signs in patterns:
        v = torch.tensor(signs).reshape(out.shape)
        monkeypatch.setattr(mod, "_signs", lambda y, generator, v=v: v)
        total = total + estimate(model, data, 0)
    return total / len(patterns)


def test_the_numbers_of_the_notes(monkeypatch):
    """c_W1*m_1 = 1.5*2.5 for layer 1, c_W2 = 4.75 for layer 2."""
    model, data = paper()
    found = enumerate_signs(model, data, monkeypatch) / (2 * torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([3.75, 4.75]), rtol=1e-12, atol=1e-12)


def conv_bn():
    parts = nn.Conv1d(2, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(*parts)


NETS = {
    "chain": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)),
    "batch norm in training": (conv_bn, (2, 3)),
    "batch norm in eval": (lambda: conv_bn().eval(), (2, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (3,)),
}


@pytest.mark.parametrize("net", NETS)
def test_all_signs(net, monkeypatch):
    model, data = NETS[net][0](), torch.randn(3 if net != "layer norm" else 2, *NETS[net][1])
    wanted = traces(model, data)
    found = enumerate_signs(model, data, monkeypatch)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
def test_mean_of_draws(net):
    """Within 5 standard errors of 300 draws."""
    model, data = NETS[net][0](), torch.randn(4, *NETS[net][1])
    wanted = traces(model, data)
    draws = torch.stack([estimate(model, data, seed) for seed in range(300)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - wanted).abs() <= 5 * error + 1e-10 * wanted + 1e-20).all()  # or zero
    assert (error < 0.1 * wanted + 1e-12).all()


def test_signs():
    y = torch.empty(200, 7, dtype=torch.bfloat16)
    v = mod._signs(y, torch.Generator().manual_seed(0))
    assert v.shape == y.shape and v.dtype == y.dtype
    assert (v.abs() == 1).all()
    assert abs(v.double().mean()) < 5 / 1400**0.5
    products = v.double()[:, :, None] * v.double()[:, None, :]
    assert (products.mean(0) - torch.eye(7)).abs().max() < 5 / 200**0.5
    again = mod._signs(y, torch.Generator().manual_seed(0))
    assert torch.equal(v, again)
    assert not torch.equal(v, mod._signs(y, torch.Generator().manual_seed(1)))


def test_nothing_else_is_touched():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)])
    model[2].weight.requires_grad_(False)
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)
    data = torch.randn(4, 3)
    out = model[0](data) + model[2](data)
    rng = torch.get_rng_state()
    found = probe(out, list(model.parameters()), torch.Generator().manual_seed(0))
    none = [p is None for p in found]
    assert none == [False, False, True, True, True, False]
    assert torch.equal(found[1], found[5]) and not found[1].requires_grad
    assert all((p.grad == 1).all() for p in model[0].parameters())
    assert all(p.grad is None for m in list(model)[1:] for p in m.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_default_generator():
    model, data = paper()
    torch.manual_seed(3)
    a = probe(model(data), [model[0].weight], None)[0]
    torch.manual_seed(3)
    assert torch.equal(a, probe(model(data), [model[0].weight])[0])


def test_outputs():
    y = torch.zeros(2, 3)
    assert output_tensor(y) is y
    assert output_tensor({"logits": y, "loss": None}) is y
    assert output_tensor(types.SimpleNamespace(logits=y)) is y


@pytest.mark.parametrize(
    "output, message",
    [
        ((torch.zeros(2), torch.zeros(2)), "returned tuple, wanted one tensor"),
        ([torch.zeros(2)], "returned list"),
        (None, "returned NoneType"),
        ({"out": torch.zeros(2)}, "returned dict"),
        (types.SimpleNamespace(logits=3.0), "returned SimpleNamespace"),
        (torch.zeros(2, dtype=torch.long), r"is torch.int64 of shape \(2,\)"),
        (torch.zeros(2, dtype=torch.complex64), "is torch.complex64"),
        (torch.zeros(()), "with the batch in dim 0"),
    ],
)
def test_refused_outputs(output, message):
    with pytest.raises(TypeError, match=message):
        probe(output, [], None)


def test_no_graph():
    model, data = paper()
    with torch.no_grad():
        out = model(data)
    with pytest.raises(RuntimeError, match="run the model with gradients enabled"):
        probe(out, list(model.parameters()), None)
