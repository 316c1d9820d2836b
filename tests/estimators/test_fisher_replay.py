"""Curvature from drawn labels: what a run leaves as it was, what is refused."""

from __future__ import annotations

import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from fisher_nets import N, Scale, Square, Squared, Wrap, by_graph, chain, each, fixed, run
from torch import nn

from layerlr.estimators.curvature import forward_products
from layerlr.estimators.curvature.fisher import products
from layerlr.estimators.curvature.module_products import Tangent
from layerlr.estimators.replay import ModelReplay

pytestmark = pytest.mark.usefixtures("float64_by_default")


class Once(Square):
    """Without a second derivative either."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))


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
