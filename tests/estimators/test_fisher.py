"""Curvature from drawn labels: each draw against explicit Jacobians, their mean against F."""

from __future__ import annotations

import itertools
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from layerlr.estimators.curvature import fisher as mod
from layerlr.estimators.curvature import forward_products, module_products
from layerlr.estimators.curvature.fisher import products
from layerlr.estimators.curvature.module_products import Tangent
from layerlr.estimators.replay import ModelReplay

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


def vectors(*shape):
    return lambda: torch.randn(N, *shape)


def tokens():
    return torch.randint(6, (N, 2))


NETS = {
    "chain": (chain, vectors(4)),
    "conv": (conv, vectors(1, 3, 3)),
    "embedding": (embedding, tokens),
    "positions": (positions, vectors(4, 3)),
}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def by_graph(out, r, tangents):
    """Sum of s_i^2 for a layer to each tangent, one sample at a time through out's graph."""
    total = torch.zeros(len(tangents))
    for i in range(len(out)):
        params = [t.param for t in tangents]
        grads = torch.autograd.grad((out[i] * r[i]).sum(), params, retain_graph=True)
        total += torch.stack([(g * t.value).sum() for g, t in zip(grads, tangents)]) ** 2
    return total


def test_several_tangents_of_a_layer_for_one_parameter(monkeypatch):
    model, args = chain(), (torch.randn(N, 4),)
    tangents = [Tangent(model[0].weight, torch.randn(5, 4), 0) for _ in range(2)]
    check(model, args, tangents, monkeypatch)


def test_layers_that_do_not_take_part():
    model = Wrap(lambda m, x: m.a(x), a=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    tangents = each(model, lambda i, name: 3 * i)
    found = run(model, (torch.randn(N, 4),), tangents)
    assert ((found > 0) == torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]).bool()).all()


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


class Square(torch.autograd.Function):
    """Without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Once(Square):
    """Without a second derivative either."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))


class Squared(Scale):
    def __init__(self, n, square):
        super().__init__(n)
        self.square = square

    def forward(self, x):
        return self.square.apply(x * self.gain)


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


# What is left as it was


def snapshot(model):
    return (
        [p.grad for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [p.detach().clone() for p in model.parameters()],
        torch.get_rng_state(),
    )


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for u, v in zip(a[:4], b[:4])
        for x, y in zip(u, v)
    ) and torch.equal(a[4], b[4])


def hooks(model):
    return [
        len(h)
        for m in model.modules()
        for h in (m._forward_hooks, m._forward_pre_hooks, m._forward_hooks_with_kwargs)
    ]


@pytest.mark.parametrize("generator", [True, False])
def test_nothing_is_touched(generator):
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Scale(4, 0.5), nn.Linear(4, 3)
    )
    model[0].bias.requires_grad_(False)
    watch = ModelReplay(model)
    before = hooks(model)
    model(torch.randn(N, 4))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    was = snapshot(model)
    tangents = each(model)
    torch.set_rng_state(was[4])
    with watch.replay() as (args, kwargs):
        given = torch.Generator().manual_seed(0) if generator else None
        products(model, args, kwargs, tangents, len(tangents), "categorical", "mean", given)
    assert same(was, snapshot(model))
    assert hooks(model) == before
    assert watch._seen is not None and not watch._replaying


def test_dropout_is_replayed(monkeypatch):
    """The same random numbers as the pass that was seen, also where a module runs again."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.5), Scale(8, 0.5), nn.Linear(8, 8), nn.Dropout(0.5)
    )
    watch = ModelReplay(model)
    data, r = torch.randn(N, 4), torch.randn(N, 8)
    state = torch.get_rng_state()
    out = model(data)
    torch.randn(7)
    fixed(monkeypatch, r)
    tangents = each(model)
    wanted = by_graph(out, r, tangents)
    with watch.replay() as (args, kwargs):
        found = run(model, args, tangents, reduction="sum", kwargs=kwargs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    torch.set_rng_state(state)
    assert torch.equal(model(data), out)  # the masks matter


def test_buffers_see_one_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Scale(4), nn.Linear(4, 3))
    run(model, (torch.randn(N, 4),), each(model))
    assert model[1].num_batches_tracked == 1 and model[2].calls == 1


def test_a_second_run_draws_the_same(monkeypatch):
    inner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    model = Wrap(lambda m, bag: m.a(bag.x), a=inner)
    data, tangents = torch.randn(N, 4), each(inner)
    state = torch.get_rng_state()
    wanted = run(inner, (data,), tangents)
    torch.set_rng_state(state)
    assert torch.equal(run(model, (types.SimpleNamespace(x=data),), tangents), wanted)


def test_graph_and_gradients_off_outside():
    model, args = chain(), (torch.randn(N, 4),)
    tangents = each(model)
    with torch.no_grad():
        found = run(model, args, tangents)
    assert torch.equal(found, run(model, args, tangents)) and not found.requires_grad


@pytest.mark.parametrize("where", ["forward", "hook"])
def test_hooks_are_removed_after_an_exception(where, monkeypatch):
    class Fails(nn.Linear):
        def forward(self, x):
            raise FloatingPointError("boom")

    model = nn.Sequential(nn.Linear(4, 4), Fails(4, 3) if where == "forward" else nn.Linear(4, 3))
    if where == "hook":

        def boom(*_):
            raise FloatingPointError("boom")

        monkeypatch.setattr(forward_products, "plain_product", boom)
    before, was = hooks(model), snapshot(model)
    with pytest.raises(FloatingPointError):
        run(model, (torch.randn(N, 4),), each(model))
    assert hooks(model) == before
    assert all(p.requires_grad for p in model.parameters())
    assert [p.grad for p in model.parameters()] == was[0]


def test_same_generator_same_draw():
    model, args = chain(), (torch.randn(N, 4),)
    tangents = each(model)
    a, b, c = (run(model, args, tangents, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_nan_logits_give_nan():
    model, args = chain(), (torch.full((N, 4), float("nan")),)
    for likelihood in ("categorical", "bernoulli", "gaussian"):
        assert run(model, args, each(model), likelihood).isnan().any()


# Errors


@pytest.mark.parametrize("what", ["likelihood", "reduction"])
def test_unknown_choices(what):
    model = chain()
    with pytest.raises(ValueError, match=f"Invalid {what}: 'poisson', wanted one of"):
        run(model, (torch.randn(N, 4),), each(model), **{what: "poisson"})


class Outputs:
    ROWS: ClassVar = {
        "tuple": (lambda y: (y, y), "returned tuple, wanted one tensor"),
        "dict": (lambda y: {"out": y}, "returned dict"),
        "integers": (lambda y: y.long(), r"torch.int64 of shape \(3, 3\)"),
        "complex": (lambda y: y + 0j, "torch.complex128"),
        "number": (lambda y: y.sum(), r"of shape \(\), wanted floating point with the batch"),
    }


@pytest.mark.parametrize("kind", Outputs.ROWS)
def test_model_outputs(kind):
    change, message = Outputs.ROWS[kind]
    model = Wrap(lambda m, x: change(m.a(x)), a=nn.Linear(4, 3))
    with pytest.raises(TypeError, match=message):
        run(model, (torch.randn(N, 4),), each(model))


def test_categorical_needs_classes():
    model = Wrap(lambda m, x: m.a(x)[:, 0], a=nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"shape \(3,\), wanted \[N, C\]"):
        run(model, (torch.randn(N, 4),), each(model))
    assert (run(model, (torch.randn(N, 4),), each(model), "gaussian") > 0).all()


def test_tied_by_hand():
    model = Wrap(lambda m, x: F.linear(m.a(x), m.a.weight), a=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"parameter 'a\.weight' is used by the module that owns"):
        run(model, (torch.randn(N, 4),), each(model))


def test_with_and_without_the_batch():
    model = Wrap(lambda m, x: m.a(x) + m.a(x[:1]), a=nn.Linear(4, 3))
    with pytest.raises(TypeError, match="module 'a' is called both with and without the batch"):
        run(model, (torch.randn(N, 4),), each(model))


def test_input_changed_in_place():
    class Own(Scale):
        def forward(self, x):
            return x.mul_(self.gain)

    model = nn.Sequential(nn.Linear(4, 4), Own(4))
    with pytest.raises(TypeError, match=r"module '1' changes its input in place.*\(gain\)"):
        run(model, (torch.randn(N, 4),), each(model))


def test_no_forward_mode():
    model = nn.Sequential(nn.Linear(4, 4), Squared(4, Once))
    with pytest.raises(NotImplementedError, match=r"module '1', which answers for .* gain, has no"):
        run(model, (torch.randn(N, 4),), each(model))
    linear = [t for t in each(model) if t.param.dim() == 2]
    assert (run(model, (torch.randn(N, 4),), linear) > 0).all()  # the others need none


def test_strangers():
    model = chain()
    with pytest.raises(ValueError, match=r"layer 0, of shape \(2,\), belongs to no parameter"):
        run(model, (torch.randn(N, 4),), [Tangent(nn.Parameter(torch.zeros(2)), torch.zeros(2), 0)])
    with pytest.raises(ValueError, match=r"layer 0 has shape \(2,\), its parameter \(5, 4\)"):
        run(model, (torch.randn(N, 4),), [Tangent(model[0].weight, torch.zeros(2), 0)])
