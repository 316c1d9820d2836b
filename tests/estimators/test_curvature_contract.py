"""Step sizes from curvature: gradients and graphs, state, copies, what people see."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from curvature_nets import FREE, D, descend, kept, mlp, near, scalars, step
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr.rules import Curvature

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


# -- contract --------------------------------------------------------------------------------------


def test_gradients_keep_their_values_and_lose_their_graph():
    model, _ = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule=Curvature())
    gc.collect()
    gc.disable()
    try:
        hidden = model[1](model[0](torch.ones(2, 3, dtype=D)))
        ref = weakref.ref(hidden)
        model[2](hidden).square().sum().backward(create_graph=True)
        del hidden
        assert ref() is not None
        before = [p.grad.detach().clone() for p in model.parameters()]
        opt.step()
        assert ref() is None
    finally:
        gc.enable()
    for p, g in zip(model.parameters(), before):
        assert not p.grad.requires_grad and torch.equal(p.grad, g)


def test_gradients_beside_the_rule_lose_their_graph_too():
    model, loss = mlp()
    groups = [{"params": m.parameters()} for m in (model[0], model[2])]
    opt = layerlr.SGD(groups, lr=0.1, rule=Curvature())
    opt.param_groups[1]["rule"] = None
    step(opt, loss)
    assert not any(p.grad.requires_grad for p in model.parameters())


def test_gradients_that_are_views():
    """As those of DistributedDataParallel, or parts of a flat one."""
    model, loss = mlp()
    params = list(model.parameters())
    opt = layerlr.SGD(params, lr=0.1, rule=Curvature())
    grads = torch.autograd.grad(loss(), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p)
    opt.step()
    assert not any(p.grad.requires_grad for p in params)


@pytest.mark.parametrize("kind", ["hessian", "exact"])
def test_no_graph(kind):
    model, loss = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule=Curvature(kind))
    loss().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"create_graph=optimizer\.is_second_order"):
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before))


def test_a_layer_whose_loss_is_linear_has_no_curvature():
    params = scalars(1.0, 1.0)
    opt = layerlr.SGD(params, lr=1.0, rule=Curvature("exact", coupled=False, damping=0.0))
    step(opt, lambda: params[0].sum() + 2 * params[1].square().sum())
    near(kept(opt, params), [1e-6, 0.25])  # without bound: min_step


def test_finite_differences_want_a_closure():
    model, loss = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule=Curvature("finite-difference"))
    opt.attach(model)
    loss().backward()
    with pytest.raises(RuntimeError, match=r"give optimizer\.step a closure"):
        opt.step()


@pytest.mark.parametrize("kind", ["fisher", "finite-difference"])
def test_the_model_must_be_attached(kind):
    model, loss = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule=Curvature(kind))
    assert not opt.is_second_order
    loss().backward()
    with pytest.raises(RuntimeError, match=r"'curvature'.*optimizer\.attach\(model\)"):
        opt.step(lambda: None)


def test_complex_parameters_are_refused():
    params = [("fine", Parameter(torch.ones(2, 2))), ("odd", Parameter(torch.ones(2, 2) + 0j))]
    with pytest.raises(ValueError, match=r"'curvature' does not support complex.*'odd'.*adapt="):
        layerlr.SGD(params, lr=1.0, rule=Curvature())
    layerlr.SGD(params, lr=1.0, rule=Curvature(), adapt=lambda name, p: name == "fine")


def fresh(kind="hessian", refresh=2):
    model, loss = mlp()
    rule = Curvature(kind, refresh=refresh, warmup=5, seed=3, **FREE)
    opt = layerlr.AdamW(model.parameters(), lr=0.2, rule=rule)
    opt.attach(model)
    return model, opt, loss


def train(model, opt, steps):
    x, t = torch.linspace(-1, 1, 15, dtype=D).view(5, 3), torch.tensor([0, 1, 1, 0, 1])
    for _ in range(steps):
        step(opt, lambda: F.cross_entropy(model(x), t))
    state = [s[k] for s in opt.state.values() for k in ("rate", "estimate", "exp_avg")]
    return [v.detach().clone() for v in (*model.parameters(), *state)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["hessian", "fisher"])
def test_a_state_dict_resumes_bit_for_bit(kind):
    """In the middle of a refresh and the warm-up, random draws included."""
    model, opt, _ = fresh(kind)
    train(model, opt, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    wanted = train(model, opt, 4)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, opt, _ = fresh(kind)
    train(model, opt, 1)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert opt.param_groups[0]["rule"] == Curvature(kind, refresh=2, warmup=5, seed=3, **FREE)
    assert same(train(model, opt, 4), wanted)
    model, opt, _ = fresh(kind)
    assert not same(train(model, opt, 4), wanted)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies(copied):
    model, opt, _ = fresh()
    train(model, opt, 3)
    twin, other = copied((model, opt))
    assert same(train(model, opt, 3), train(twin, other, 3))


def test_a_step_without_gradients_enabled():
    found = []
    for off in (False, True):
        model, opt, loss = fresh()
        for _ in range(2):
            opt.zero_grad()
            loss().backward(create_graph=opt.is_second_order)
            with torch.set_grad_enabled(not off):
                opt.step()
        found.append([p.detach() for p in model.parameters()])
    assert same(*found)


def test_a_closure():
    found = []
    for inside in (False, True):
        model, opt, loss = fresh()

        def closure(opt=opt, loss=loss):
            opt.zero_grad()
            value = loss()
            value.backward(create_graph=opt.is_second_order)
            return value

        for _ in range(3):
            if inside:
                assert opt.step(closure) > 0
            else:
                closure()
                opt.step()
        found.append([p.detach() for p in model.parameters()])
    assert same(*found)


def test_what_people_see(capsys):
    model, loss = mlp()
    opt = layerlr.SGD(
        model.named_parameters(), lr=0.5, rule=Curvature("exact", **FREE), layers="module"
    )
    step(opt, loss)
    text = layerlr.describe(opt)
    assert "Curvature(" in text and "curvature='exact'" in text and "adapted" in text
    stats = opt.layer_stats()
    rates = torch.cat([opt.state[m.weight]["rate"] for m in (model[0], model[2])])
    assert (rates > 0).all() and torch.equal(stats["scale"], rates)
    torch.testing.assert_close(stats["lr"], 0.5 * rates)


def test_half_precision_and_compile_free_training():
    """bfloat16 weights: sums are float64, rates finite, the loss falls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    x = torch.randn(16, 3).bfloat16()
    opt = layerlr.SGD(model.parameters(), lr=1.0, rule=Curvature())
    losses = [step(opt, lambda: (model(x) - 1).square().mean()) for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0]


def test_the_default_needs_no_rate():
    """Curvatures over six decades."""
    hessian = torch.diag(torch.tensor([1e-3, 1.0, 1e3], dtype=D))
    losses = descend(hessian, [1, 1, 1], torch.ones(3, dtype=D), Curvature(max_step=1e6), 30)
    assert losses[-1] < 1e-6 * losses[0]
