"""Curvature from drawn labels: architectures, precisions, compiled models."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from fisher_nets import (
    N,
    Scale,
    Square,
    Squared,
    Wrap,
    by_graph,
    chain,
    check,
    each,
    fixed,
    run,
    tokens,
    vectors,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from layerlr.estimators.curvature import fisher as mod
from layerlr.estimators.curvature.module_products import Tangent

pytestmark = pytest.mark.usefixtures("float64_by_default")


# Architectures


def inplace():
    def forward(m, x):
        y = m.b(F.relu_(m.a(x)))
        y += 1.0
        return m.c(m.act(y))

    modules = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 3)}
    return Wrap(forward, act=nn.ReLU(inplace=True), **modules)


def called_twice():
    return Wrap(lambda m, x: m.b(m.a(torch.tanh(m.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def tied():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return Wrap(lambda m, x: m.b(torch.tanh(m.a(x)))[:, :3], a=a, b=b)


def tied_to_a_direct_use():
    """b holds a's weight and is never called; the model uses it."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    return Wrap(lambda m, x: F.linear(torch.tanh(m.a(x)), m.b.weight), a=a, b=b)


def root_parameters():
    """The model multiplies by a parameter of its own, past any module."""
    model = Wrap(lambda m, x: m.a(x * m.gain) * m.gain[:3], a=nn.Linear(4, 3))
    model.gain = nn.Parameter(torch.rand(4) + 0.5)
    return model


def table():
    """Positions of a table broadcast over the batch: dim 0 of its output is not the batch."""

    def forward(m, x):
        return m.out(torch.tanh(m.emb(x) + m.table(torch.arange(2))).flatten(1))

    return Wrap(forward, emb=nn.Embedding(6, 4), table=nn.Embedding(2, 4), out=nn.Linear(8, 3))


def windows():
    """A module in whose rows a sample has several, inside a block that fits."""
    block = Wrap(lambda m, x: m.a(x.reshape(-1, 2)).tanh().reshape(-1, 4), a=nn.Linear(2, 2))
    return Wrap(lambda m, x: m.out(m.block(x)), block=block, out=nn.Linear(4, 3))


def flat_output():
    """[N, T, 4] in, [N*T, 3] out: the rows of the output are the samples."""
    return Wrap(lambda m, x: m.b(m.a(x).tanh().flatten(0, 1)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def recurrent(kind):
    def make():
        return Wrap(
            lambda m, x: m.out(m.rnn(x)[0][:, -1]),
            rnn=kind(4, 3, batch_first=True),
            out=nn.Linear(3, 3),
        )

    return make


def attention(train):
    def make():
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        return Wrap(lambda m, x: m.out(m.a(x)[:, 0]), a=layer, out=nn.Linear(4, 3)).train(train)

    return make


def weight_norm():
    """The weight's own modules return N rows as well, from no input."""
    linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, N))
    return Wrap(lambda m, x: m.b(m.a(x)), a=linear, b=nn.Linear(N, 3))


def hooked():
    """The user's hook changes the output of a plain module."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, y: y.tanh())
    return model


def checkpointed():
    def forward(m, x):
        return m.c(checkpoint(lambda y: m.b(m.a(y).tanh()), x, use_reentrant=False))

    return Wrap(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))


def own():
    return nn.Sequential(nn.Linear(4, 4), Scale(4), nn.Linear(4, 3))


ARCHITECTURES = {
    "inplace": (inplace, vectors(4)),
    "called twice": (called_twice, vectors(4)),
    "tied": (tied, vectors(4)),
    "tied to a direct use": (tied_to_a_direct_use, vectors(4)),
    "root parameters": (root_parameters, vectors(4)),
    "root alone": (lambda: nn.Linear(4, 3), vectors(4)),
    "table": (table, tokens),
    "windows": (windows, vectors(4)),
    "flat output": (flat_output, vectors(2, 4)),
    "lstm": (recurrent(nn.LSTM), vectors(2, 4)),
    "gru": (recurrent(nn.GRU), vectors(2, 4)),
    "attention in training": (attention(True), vectors(2, 4)),
    "attention in eval": (attention(False), vectors(2, 4)),
    "weight norm": (weight_norm, vectors(4)),
    "hooked": (hooked, vectors(4)),
    "own module": (own, vectors(4)),
    "embedding bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.RMSNorm(4), nn.Linear(4, 3)),
        tokens,
    ),
    "bilinear": (lambda: Wrap(lambda m, x: m.a(x, x.cos()), a=nn.Bilinear(4, 4, 3)), vectors(4)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, monkeypatch):
    model, data = ARCHITECTURES[name][0](), ARCHITECTURES[name][1]()
    check(model, (data,), each(model), monkeypatch, rtol=1e-9)
    check(model, (data,), each(model, lambda i, name: 0), monkeypatch, rtol=1e-9)


def test_checkpoint(monkeypatch):
    """jacrev does not go through checkpoint: against the same model without it."""
    model, args = checkpointed(), (torch.randn(N, 4),)
    plain = Wrap(lambda m, x: m.c(m.b(m.a(x).tanh())), a=model.a, b=model.b, c=model.c)
    tangents = each(model)
    fixed(monkeypatch, torch.randn(N, 3))
    torch.testing.assert_close(run(model, args, tangents), run(plain, args, tangents))


def test_time_first(monkeypatch):
    """Rows that are not samples are left to the model, as long as they are not as many."""
    model = Wrap(
        lambda m, x: m.out(m.rnn(x.transpose(0, 1))[0][-1]), rnn=nn.GRU(4, 3), out=nn.Linear(3, 3)
    )
    check(model, (torch.randn(N, 2, 4),), each(model), monkeypatch)


@pytest.mark.parametrize("kind", ["object", "dict", "keyword"])
def test_logits(kind):
    inner = nn.Linear(4, 3)
    wraps = {
        "object": lambda y: types.SimpleNamespace(logits=y, hidden_states=None),
        "dict": lambda y: {"logits": y, "loss": y.sum()},
        "keyword": lambda y: y,
    }
    model = Wrap(lambda m, x: wraps[kind](m.a(x)), a=inner)
    args = (torch.randn(N, 4),)
    tangents = each(inner)
    if kind == "keyword":
        found = run(model, (), tangents, kwargs={"x": args[0]})
    else:
        found = run(model, args, tangents)
    assert torch.equal(found, run(inner, args, tangents))


def test_arguments_without_tensors(monkeypatch):
    """The batch is told from the output, in a second run."""
    inner = chain()
    model = Wrap(lambda m, bag: m.a(bag.x), a=inner)
    data = torch.randn(N, 4)
    tangents = each(inner)
    fixed(monkeypatch, torch.randn(N, 3))
    found = run(model, (types.SimpleNamespace(x=data),), tangents)
    torch.testing.assert_close(found, run(inner, (data,), tangents))


def test_batch_norm_in_training_is_the_sum_through_each_sample(monkeypatch):
    """What the docstring calls biased, as defined: rows of the module's output, all losses."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    data, r = torch.randn(N, 4), torch.randn(N, 3)
    y = model[0](data).detach().requires_grad_()
    (grad,) = torch.autograd.grad((model[1](y) * r).sum(), y)
    tangent = Tangent(model[0].weight, torch.randn(3, 4), 0)
    s = (grad * (data @ tangent.value.T)).sum(1)
    fixed(monkeypatch, r)
    torch.testing.assert_close(run(model, (data,), [tangent], reduction="sum")[0], (s * s).sum())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norm_by_hooks(monkeypatch):
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    data, r = torch.randn(N, 4), torch.randn(N, 3)
    fixed(monkeypatch, r)
    tangents = each(model)
    wanted = by_graph(model(data), r, tangents)
    torch.testing.assert_close(run(model, (data,), tangents, reduction="sum"), wanted)


def test_embedding_that_renormalizes_itself(monkeypatch):
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3))
    data, r = tokens(), torch.randn(N, 3)
    fixed(monkeypatch, r)
    tangents = each(model)
    wanted = by_graph(model(data), r, tangents)
    torch.testing.assert_close(run(model, (data,), tangents, reduction="sum"), wanted)


@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_compiled_models_run_without_compiling(how):
    def backend(*_):
        raise AssertionError("compiled")

    model, args = chain(), (torch.randn(N, 4),)
    tangents = each(model)
    wanted = run(model, args, tangents)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "part":
        model = nn.Sequential(torch.compile(model, backend=backend), nn.Identity())
    else:
        model = torch.compile(model, backend=backend)
    assert torch.equal(run(model, args, tangents), wanted)


def test_sums_of_half_precision_do_not_overflow(monkeypatch):
    model = nn.Linear(4, 3, bias=False).half()
    inner = nn.Sequential(model)
    fixed(monkeypatch, torch.full((N, 3), 100.0).half())
    tangent = Tangent(model.weight, torch.full((3, 4), 2500.0).half(), 0)
    for m in (model, inner):
        found = run(m, (torch.ones(N, 4).half(),), [tangent], reduction="sum")
        assert found.item() == pytest.approx(N * (3 * 100 * 1e4) ** 2, rel=1e-3)


def test_mixed_precision(monkeypatch):
    torch.set_default_dtype(torch.float32)
    model, data = chain(), torch.randn(N, 4)
    tangents = each(model)
    fixed(monkeypatch, torch.randn(N, 3))
    wanted = run(model, (data,), tangents)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, (data,), tangents)
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.05)
    half = model.bfloat16()
    low = [Tangent(p, t.value, t.layer) for p, t in zip(half.parameters(), tangents)]
    fixed(monkeypatch, mod._residual(half(data.bfloat16()), "gaussian", None))
    assert run(half, (data.bfloat16(),), low).isfinite().all()


def test_without_forward_mode(monkeypatch):
    """The module's double backward in its place: s by the graph of each sample."""
    model, data = nn.Sequential(nn.Linear(4, 4), Squared(4, Square)), torch.randn(N, 4)
    r = torch.randn(N, 4)
    fixed(monkeypatch, r)
    tangents = each(model)
    torch.testing.assert_close(
        run(model, (data,), tangents, reduction="sum"), by_graph(model(data), r, tangents)
    )
