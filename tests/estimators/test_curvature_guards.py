"""Step sizes from curvature: guards, options, layers."""

from __future__ import annotations

import math

import pytest
import torch
from curvature_nets import BARE, FREE, D, estimates, kept, mlp, near, scalars, signed, step
from torch.nn import Parameter

import layerlr
from layerlr.rules import Curvature

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
EXACT = Curvature("exact", **BARE)


def parabolas(params, *curvatures, **more):
    """Sum of c*w^2/2: layers that do not touch each other."""
    return lambda: sum(0.5 * c * p.square().sum() for c, p in zip(curvatures, params))


# -- guards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(("last", "reused"), [(0.0, 1e-6), (0.3, 0.3)])
def test_negative_curvature(coupled, last, reused):
    """Taken as positive, or left out of the mean, and the last rate goes on."""
    for negative, wanted in (("absolute", 0.25), ("reuse", reused)):
        params = scalars(1.0)
        rule = Curvature(damping=0.0, coupled=coupled, negative=negative)
        opt = layerlr.SGD(params, lr=1.0, rule=rule)
        opt.state[params[0]]["rate"].fill_(last)
        step(opt, parabolas(params, -4.0))
        near(kept(opt, params), [wanted])
        used = kept(opt, params, "estimate_weight")
        assert used == (0.0 if negative == "reuse" else pytest.approx(0.1))


def test_ascent_takes_the_last_rate():
    params = scalars(1.0)
    opt = layerlr.SGD(params, lr=1.0, momentum=0.9, rule=Curvature("exact", damping=0.0))
    step(opt, parabolas(params, 2.0))  # to 0: then momentum carries it past
    near(kept(opt, params), [0.5])
    params[0].data.fill_(-0.5)
    step(opt, parabolas(params, 2.0))  # g = -1, u = .8
    near(kept(opt, params), [0.5])
    near(params[0], [-0.5 - 0.5 * 0.8])


def test_bounds_by_direction():
    """.1 where the direction scales its step; none where it is linear in the gradient."""
    cases = [
        *((layerlr.SGD, 1e3), (layerlr.AMomSGD, 1e4)),  # 1/curvature; u = g/10
        *((layerlr.AdamW, 0.1), (layerlr.RMSprop, 0.1)),
    ]
    for cls, most in cases:
        params = scalars(3.0, 3.0)
        opt = cls(params, lr=1.0, rule=Curvature("exact", coupled=False, damping=0.0))
        step(opt, parabolas(params, 1e-3, 1e9))
        rates = kept(opt, params)
        # not float32's .1
        assert rates[0] == (most if most == 0.1 else pytest.approx(most, rel=1e-12))
        assert rates[1] == 1e-6 if cls is layerlr.SGD else rates[1] >= 1e-6
    params = scalars(3.0)
    rule = Curvature("exact", coupled=False, max_step=0.2)
    opt = layerlr.SGD(params, lr=1.0, rule=rule)
    step(opt, parabolas(params, 1.0))
    assert kept(opt, params) == 0.2


def test_warmup():
    params = scalars(1.0, 1.0)
    opt = layerlr.SGD(params, lr=0.0, rule=Curvature("exact", warmup=4, damping=0.0))
    seen = []
    for _ in range(6):
        step(opt, parabolas(params, 2.0, 4.0))
        seen.append(kept(opt, params).tolist())
    near(torch.tensor(seen)[:, 0], [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_a_rate_that_is_taken_again_is_not_warmed_up_again():
    params = scalars(1.0)
    opt = layerlr.SGD(params, lr=0.0, rule=Curvature("exact", warmup=10, negative="reuse"))
    opt.state[params[0]]["rate"].fill_(0.3)
    for _ in range(3):
        step(opt, lambda: params[0].sum() + 0.0 * params[0].square().sum())  # no curvature
        near(kept(opt, params), [0.3])


@pytest.mark.parametrize("coupled", [False, True])
def test_running_mean(coupled):
    """By hand, over three steps whose curvatures are 8, 4, 2."""
    params = scalars(1.0)
    rule = Curvature("exact", ema=0.5, coupled=coupled, damping=0.0)
    opt = layerlr.SGD(params, lr=0.0, rule=rule)
    n = 2 if coupled else 1
    for i, c in enumerate((8.0, 4.0, 2.0)):
        step(opt, parabolas(params, c))
        wanted = [8**n, (8**n + 2 * 4**n) / 3, (8**n + 2 * 4**n + 4 * 2**n) / 7][i]
        near(estimates(opt, params), [wanted])
        near(kept(opt, params), [wanted ** (-1 / n)])


def test_refresh(monkeypatch):
    params = scalars(1.0, 2.0)
    opt = layerlr.SGD(params, lr=0.1, rule=Curvature(refresh=3))
    calls = count_products(monkeypatch)
    rates, asked = [], []
    for i in range(7):
        asked.append(opt.is_second_order)
        step(opt, lambda i=i: (1 + i) * sum(p.pow(4).sum() for p in params))
        rates.append(tuple(kept(opt, params).tolist()))
    assert asked == [i % 3 == 0 for i in range(7)]
    assert len(calls) == 6  # two where an estimate is due
    assert rates[0] == rates[1] == rates[2] != rates[3] == rates[4] == rates[5] != rates[6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cls", [layerlr.SGD, layerlr.AdamW])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["hessian", "exact"])
def test_a_gradient_that_is_not_finite(bad, cls, first, kind):
    """Its layer stays, with its rate; the others go on."""
    params = [Parameter(torch.tensor([1.0, 2.0], dtype=D)), *scalars(1.0)]
    opt = cls(params, lr=1.0, rule=Curvature(kind))
    loss = parabolas(params, 2.0, 4.0)
    if not first:
        step(opt, loss)
    weights, rates = [p.detach().clone() for p in params], kept(opt, params)
    opt.zero_grad()
    (loss() + params[0].sum() * params[1].sum()).backward(create_graph=True)
    with torch.no_grad():
        params[0].grad[1] = bad
    opt.step()
    assert torch.equal(params[0], weights[0]) and kept(opt, params)[0] == rates[0]
    assert not torch.equal(params[1], weights[1]) and params[1].isfinite().all()
    step(opt, loss)  # and the next estimate is a good one
    assert kept(opt, params).isfinite().all() and (kept(opt, params) > 1e-4).all()


def test_a_layer_without_gradient_waits():
    params = scalars(1.0, 1.0)
    opt = layerlr.SGD(params, lr=0.5, rule=EXACT)
    step(opt, lambda: params[0].square().sum())
    near(kept(opt, params), [0.5, 0.0])
    assert params[1] == 1.0
    step(opt, parabolas(params, 4.0, 8.0))
    assert kept(opt, params)[1] == 0.125
    step(opt, lambda: params[0].square().sum())
    assert kept(opt, params)[1] == 0.125


def test_a_layer_with_gradient_zero_keeps_its_rate():
    params = scalars(0.0, 1.0)
    opt = layerlr.SGD(params, lr=0.5, rule=Curvature("exact"))
    opt.state[params[0]]["rate"].fill_(0.7)
    step(opt, parabolas(params, 4.0, 8.0))
    assert kept(opt, params)[0] == 0.7 and params[0] == 0.0 and params[1] != 1.0
    assert kept(opt, params, "estimate_weight")[0] == 0.0


@pytest.mark.parametrize("kind", ["hessian", "exact"])
@pytest.mark.parametrize("coupled", [False, True])
def test_l2_decay_is_a_part_of_the_loss(kind, coupled):
    def run(decay, more):
        model, plain = mlp()
        params = list(model.parameters())
        rule = Curvature(kind, coupled=coupled, **FREE)
        opt = layerlr.SGD(params, lr=1.0, weight_decay=decay, rule=rule)
        for _ in range(4):
            step(opt, lambda: plain() + 0.5 * more * sum(p.square().sum() for p in params))
        return torch.cat([kept(opt, params), *(p.detach().flatten() for p in params)])

    torch.testing.assert_close(run(0.3, 0.0), run(0.0, 0.3), rtol=1e-9, atol=0)


def test_decoupled_decay_is_scaled_by_the_rate():
    (p,) = params = scalars(2.0)
    opt = layerlr.AdamW(params, lr=0.5, weight_decay=0.1, eps=1e-30, rule=EXACT)
    step(opt, parabolas(params, 8.0))  # u = 1, rho = 16, c = 8
    near(kept(opt, params), [2.0])
    near(p, [2 - 0.5 * 2 * (1 + 0.1 * 2)])


@pytest.mark.parametrize("kind", ["hessian", "exact", "finite-difference"])
def test_maximize_is_minimising_the_negated_loss(kind):
    found = []
    for sign in (1, -1):
        model, loss = mlp()
        opt = layerlr.SGD(
            model.parameters(),
            lr=1.0,
            momentum=0.9,
            weight_decay=0.01,
            maximize=sign < 0,
            rule=Curvature(kind, **FREE),
        )
        opt.attach(model)

        def closure(opt=opt, loss=loss, sign=sign):
            opt.zero_grad()
            (sign * loss()).backward(create_graph=opt.is_second_order)

        for _ in range(4):
            opt.step(closure)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_schedule_multiplies():
    params = scalars(1.0)
    opt = layerlr.SGD(params, lr=1.0, rule=EXACT)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    w = 1.0
    for i in range(3):
        step(opt, parabolas(params, 4.0))
        schedule.step()
        near(kept(opt, params), [0.25])
        w -= 0.5**i * w
        near(params[0], [w])


def count_products(monkeypatch):
    calls, grad = [], torch.autograd.grad

    def counted(outputs, *args, **kwargs):
        calls.append(len(outputs))
        return grad(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


def test_groups_with_one_rule_share_their_products(monkeypatch):
    """And couple; groups with different rules have products of their own."""
    rates = []
    for other, products in (
        (Curvature(**FREE), [4, 4]),
        (Curvature(**FREE, seed=1), [2, 2, 2, 2]),
    ):
        model, loss = mlp()
        params = list(model.parameters())
        groups = [{"params": params[:2]}, {"params": params[2:], "rule": other}]
        opt = layerlr.SGD(groups, lr=1.0, rule=Curvature(**FREE))
        with monkeypatch.context() as patch:
            calls = count_products(patch)
            step(opt, loss)
        assert calls == products
        rates.append(kept(opt, params))
    model, loss = mlp()
    one = layerlr.SGD(model.parameters(), lr=1.0, rule=Curvature(**FREE))
    step(one, loss)
    assert torch.equal(kept(one, model.parameters()), rates[0])
    assert not torch.equal(rates[0], rates[1])


@pytest.mark.parametrize("kind", ["exact", "hessian"])
def test_parts_of_a_tensor_are_layers(monkeypatch, kind):
    signed(monkeypatch, 1, -1)
    hessian = torch.tensor([[2.0, 0.5, 0.3], [0.5, 1.0, -0.2], [0.3, -0.2, 4.0]], dtype=D)
    runs = []
    for split in (True, False):
        w = torch.tensor([1.0, -2.0, 0.5], dtype=D)
        params = [Parameter(v.clone()) for v in ([w] if split else w.split([2, 1]))]
        group = {"params": params, "split": [2, 1]} if split else {"params": params}
        opt = layerlr.SGD([group], lr=1.0, rule=Curvature(kind))
        for _ in range(3):
            step(opt, lambda: 0.5 * torch.cat(params) @ hessian @ torch.cat(params))  # noqa: B023
        runs.append(torch.cat([kept(opt, params), *[p.detach() for p in params]]))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["exact", "hessian", "fisher", "finite-difference"])
def test_kernels_alone(kind):
    """Biases that the rule leaves out take the plain step."""
    model, loss = mlp()
    opt = layerlr.SGD(model.parameters(), lr=0.1, rule=Curvature(kind, **FREE), adapt="kernels")
    opt.attach(model)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        opt.zero_grad()
        loss().backward(create_graph=opt.is_second_order)

    opt.step(closure)
    for p, w in zip(model.parameters(), before):
        factor = opt.state[p]["rate"] if p.dim() > 1 else 1.0
        torch.testing.assert_close(p.detach(), w - 0.1 * factor * p.grad, rtol=1e-12, atol=0)
        assert ("rate" in opt.state[p]) == (p.dim() > 1)
        assert p.dim() == 1 or factor != 1.0


def test_layers_of_modules():
    """Weight and bias together: the quadratic form of both."""
    model, loss = mlp()
    opt = layerlr.SGD(model.named_parameters(), lr=0.0, rule=EXACT, layers="module")
    step(opt, loss)
    params, first = list(model.parameters()), list(model.parameters())[:2]
    grads = torch.autograd.grad(loss(), first, create_graph=True)
    h = torch.autograd.grad(grads, first, [g.detach() for g in grads])
    c = sum((g * x).sum() for g, x in zip(grads, h))
    gg = sum(g.square().sum() for g in grads)
    near(opt.state[params[0]]["rate"], [float((gg / c).detach())], 1e-11)
    assert opt.layer_stats()["names"] == ["0", "2"]
