"""Wrapped optimizers where people use them: schedules, closures, hooks, AMP, compilation."""

from __future__ import annotations

import pytest
import torch
from cases import copies, random, same_bits, set_grads, train
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from wrapped import RULES, params_of, wrapped

import layerlr


def base_lr_of_step(opt) -> list:
    """What the base's lr is while it steps, one entry a step."""
    seen = []
    opt.base.register_step_pre_hook(lambda o, *_: seen.append(float(o.param_groups[0]["lr"])))
    return seen


# -- lr --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lambda", "onecycle", "by hand"])
@pytest.mark.parametrize("rule", ["layca", "relative", "brake", "lars"])
def test_schedulers_work_on_the_wrapper(rule, kind):
    """The base follows by its ratio under rules with an lr of their own, else it has the lr."""
    params = params_of()
    opt = wrapped("adam", rule, params)
    first = opt.param_groups[0]["lr"]
    reference = opt.param_groups[0].get("reference_lr")
    assert (reference is not None) == (rule in ("layca", "relative"))
    seen, wanted = base_lr_of_step(opt), []
    if kind == "lambda":
        scheduler = LambdaLR(opt, lambda k: 0.5**k)
    elif kind == "onecycle":
        scheduler = OneCycleLR(opt, max_lr=2 * first, total_steps=6, cycle_momentum=False)
    for step in range(5):
        if kind == "by hand":
            opt.param_groups[0]["lr"] = first / (step + 1)
        lr = opt.param_groups[0]["lr"]
        wanted.append(0.01 * lr / reference if reference else lr)
        set_grads(params, step)
        before = params[0].detach().double().clone()
        opt.step()
        if rule == "relative":
            length = (params[0].detach().double() - before).norm() / before.norm()
            assert length.item() == pytest.approx(lr, rel=1e-4)
        if kind != "by hand":
            scheduler.step()
    assert seen == pytest.approx(wanted, rel=1e-12)
    assert opt.base.param_groups[0]["lr"] == (0.01 if reference else wanted[-1])


def test_cycles_of_momentum_are_the_bases():
    """OneCycleLR writes momentum into the optimizer that it is given: there is none."""
    opt = wrapped("sgd", "layca", params_of())
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(opt, max_lr=0.1, total_steps=6)


@pytest.mark.parametrize("rule", ["layca", "lars"])
def test_lr_a_tensor(rule):
    lr = torch.tensor(0.05, dtype=torch.float64)
    found = []
    for value in (lr, 0.05):
        params = params_of()
        base = torch.optim.AdamW(params, lr=0.01)
        opt = layerlr.wrap(base, RULES[rule].rule, lr=value)
        for step in range(3):
            if value is lr:
                lr.fill_(0.05 / (step + 1))
            else:
                opt.param_groups[0]["lr"] = 0.05 / (step + 1)
            train(opt, params, 1, seed=step)
        found.append(params)
    assert same_bits(*found)
    assert opt.param_groups[0]["lr"] == 0.05 / 3


@pytest.mark.parametrize("rule", RULES)
def test_a_warm_up_that_starts_at_zero(rule):
    """No bit changes at 0, a radius is not stored; from there as if that step had not been."""
    params = params_of()
    opt = wrapped("sgd", rule, params)
    full = opt.param_groups[0]["lr"]
    opt.param_groups[0]["lr"] = 0.0
    before = copies(params)
    train(opt, params, 2)
    assert same_bits(params, before)
    assert all(float(s.get("radius", torch.zeros(1))) == 0.0 for s in opt.state.values())
    opt.param_groups[0]["lr"] = full
    train(opt, params, 1)
    assert not any(torch.equal(p, v) for p, v in zip(params, before, strict=True))


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["layca", "singh"])
def test_closures_hooks_and_zero_grad(rule):
    params, order = params_of(), []
    opt = wrapped("adamw", rule, params)
    opt.register_step_pre_hook(lambda *_: order.append("before"))
    opt.register_step_post_hook(lambda *_: order.append("after"))
    opt.base.register_step_pre_hook(lambda *_: order.append("base before"))
    opt.base.register_step_post_hook(lambda *_: order.append("base after"))

    def closure():
        order.append("closure")
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = opt.step(closure)
    second = opt.step(closure)
    assert order == ["before", "closure", "base before", "base after", "after"] * 2
    assert second < first
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("rule", ["layca", "lars"])
def test_gradient_scaler(rule):
    """The scaled loss gives the bits of the plain one; an overflow changes nothing."""
    found = []
    for amp in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        row = RULES[rule]
        opt = layerlr.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), row.rule, lr=row.lr)
        scaler = torch.amp.GradScaler("cpu", enabled=amp, init_scale=256.0)
        for step in range(4):
            opt.zero_grad()
            loss = model(random([(8, 6)], torch.float32, step)[0]).square().mean()
            scaler.scale(loss).backward()
            if amp and step == 2:
                model[0].weight.grad[0, 0] = torch.inf
                before = copies(model.parameters())
            if amp or step != 2:
                scaler.step(opt)
            if amp and step == 2:
                assert same_bits(model.parameters(), before)
            scaler.update()
        found.append(list(model.parameters()))
    assert same_bits(*found)


@pytest.mark.parametrize("rule", ["layca", "lars", "brake"])
def test_what_does_not_train(rule):
    """A frozen parameter, one without a gradient, none with one."""
    params = params_of(shapes=((7, 5), (6, 5), (5, 5)))
    params[1].requires_grad_(False)
    opt = wrapped("adamw", rule, params)
    set_grads(params, 0)
    params[1].grad = params[2].grad = None
    before = copies(params)
    opt.step()
    assert not torch.equal(params[0], before[0]) and same_bits(params[1:], before[1:])
    before = copies(params)
    opt.zero_grad()
    opt.step()
    assert same_bits(params, before)
    params[1].requires_grad_(True)  # thawed
    train(opt, params, 1)
    assert not any(torch.equal(p, v) for p, v in zip(params, before, strict=True))


@pytest.mark.parametrize("rule", ["layca", "hyperball"])
def test_layers_that_start_at_zero_grow_by_the_bases_steps(rule):
    (p,) = params_of(torch.float64, shapes=((12, 5),))
    (q,) = (Parameter(torch.zeros_like(p)) for _ in range(1))
    with torch.no_grad():
        p.zero_()
    opt = layerlr.wrap(torch.optim.SGD([p], lr=0.2), rule, lr=0.05)
    plain = torch.optim.SGD([q], lr=0.2)
    for _ in range(2):
        p.grad, q.grad = -torch.ones_like(p), -torch.ones_like(p)
        opt.step()
        plain.step()
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0)
        assert opt.state[p]["radius"].item() == pytest.approx(-2.0)  # sqrt(12 rows / 3)
    set_grads([p], 0)
    opt.step()
    assert opt.state[p]["radius"].item() == pytest.approx(2.0)
    assert p.detach().norm().item() == pytest.approx(2.0)


def test_torch_compile_around_the_step():
    """The step falls outside of the graph."""
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        opt = layerlr.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "layca", lr=0.05)

        def loop(x, model=model, opt=opt):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()

        if compiled:
            torch._dynamo.reset()
            loop = torch.compile(loop, backend="eager")
        for step in range(3):
            loop(random([(8, 6)], torch.float32, step)[0])
        found.append(list(model.parameters()))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert opt.state[model.weight]["step"] == 3
