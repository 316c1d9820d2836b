"""Gradient scaling inside the step: what `torch.amp.GradScaler` tells a fused optimizer."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from contract_helpers import photograph, same
from torch import nn

import layerlr
from layerlr import rules

#: every rule, and a direction of either kind
CASES = [case for case in cases.CASES if case.id.split("-")[0] in ("mom", "adamw")]
SHAPES = [(5, 7), (7,), (3, 4, 2), ()]


def trained(engine, case, dtype=torch.float32):
    """An optimizer with some steps behind it."""
    params = engine.params(cases.random(SHAPES), dtype)
    opt = engine.make(case, params)
    cases.train(opt, params, 2)
    return params, opt


def told(opt, scale=None, found_inf=None, device="cpu"):
    """Say what a GradScaler would say."""
    if scale is not None:
        opt.grad_scale = torch.tensor(scale, device=device)
    opt.found_inf = torch.tensor(float(found_inf or 0.0), device=device)


@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_a_power_of_two_changes_no_bit(engine, case):
    params, opt = trained(engine, case)
    others, other = trained(engine, case)
    cases.set_grads(params, 9)
    cases.set_grads(others, 9)
    for p in others:
        p.grad.mul_(1024.0)
    told(other, 1024.0, device=engine.device)
    scaled = [p.grad.clone() for p in others]
    opt.step()
    other.step()
    assert same(photograph(opt), photograph(other))
    assert all(map(torch.equal, scaled, [p.grad for p in others]))  # the scaled ones


def test_any_scale_is_divided_out(engine):
    params, opt = trained(engine, cases.BY_ID["adamw-lamb"], torch.float64)
    others, other = trained(engine, cases.BY_ID["adamw-lamb"], torch.float64)
    cases.set_grads(params, 9)
    cases.set_grads(others, 9)
    for p in others:
        p.grad.mul_(3.7)
    told(other, 3.7, device=engine.device)  # in float32, as GradScaler has it
    opt.step()
    other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_an_overflow_changes_nothing_at_all(engine, case, first):
    params, opt = trained(engine, case)
    if first:
        params = engine.params(cases.random(SHAPES))
        opt = engine.make(case, params)
    before = photograph(opt), {k: v for k, v in opt.layer_stats().items() if k != "names"}
    cases.set_grads(params, 9)
    params[0].grad[0, 0] = math.inf
    told(opt, 65536.0, True, engine.device)
    opt.step()
    assert same(before[0], photograph(opt))
    for key, value in before[1].items():
        assert torch.equal(value, opt.layer_stats()[key]), key
    # and the step after is as if it had not been
    others, other = trained(engine, case)
    if first:
        others = engine.params(cases.random(SHAPES))
        other = engine.make(case, others)
    del opt.grad_scale, opt.found_inf
    for list_, each in ((params, opt), (others, other)):
        cases.set_grads(list_, 10)
        each.step()
    assert same(photograph(opt), photograph(other))


def test_only_fused_says_that_it_unscales():
    """Lightning refuses to clip where the optimizer unscales."""
    p = [nn.Parameter(torch.ones(2, 2))]
    assert not layerlr.SGD(p, lr=0.1)._step_supports_amp_scaling
    assert layerlr.SGD(p, lr=0.1, fused=True)._step_supports_amp_scaling
    assert not layerlr.SGD(p, lr=0.1, foreach=True)._step_supports_amp_scaling


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("overflow", [None, 0, 3])
def test_with_a_scaler(overflow, fused):
    """A whole run beside the same run without scaling; an overflow is a step left out."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 5, 6), torch.randn(8, 5, 3)
    start = nn.Linear(6, 3).state_dict()
    results = []
    for scaled in (True, False):
        model = nn.Linear(6, 3)
        model.load_state_dict(start)
        opt = layerlr.SGD(model.parameters(), lr=0.05, momentum=0.9, rule="layca", fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        for step in range(8):
            if not scaled and step == overflow:
                continue
            opt.zero_grad()
            loss = (model(x[step]) - y[step]).square().mean()
            scaler.scale(loss).backward()
            if step == overflow:
                model.weight.grad[0, 0] = math.inf
            scaler.step(opt)
            scaler.update()
        assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
        assert scaler.get_scale() == (1.0 if not scaled else 256.0 if overflow is None else 128.0)
        results.append(photograph(opt))
    assert same(*results)


def test_unscaled_by_the_scaler_first():
    """Clipping: the scaler unscales, the step only gets the verdict."""
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        opt = layerlr.AdamW(model.parameters(), lr=0.05, rule="lamb", fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_a_compiled_step_is_told_too():
    torch._dynamo.reset()
    params, opt = trained(cases.Engine("cpu", "cpu"), cases.BY_ID["mom-layca"])
    others, other = trained(cases.Engine("cpu", "cpu"), cases.BY_ID["mom-layca"])
    step = torch.compile(other.step, backend="eager", fullgraph=True)
    for scale, found in ((256.0, 0), (128.0, 0), (128.0, 1)):
        for list_, each in ((params, opt), (others, other)):
            cases.set_grads(list_, 9)
            told(each, scale, found)
        opt.step()
        step()
        assert same(photograph(opt), photograph(other))


ESTIMATED = [
    *(rules.Curvature(kind, damping=0.1) for kind in ("hessian", "fisher", "exact")),
    rules.Curvature("hessian", damping=0.1, refresh=3),
    rules.BackMatching(),
    rules.BackMatching(estimator="probe"),
]


def estimated_run(rule, fused, scaled, unscale=False):
    """Rates and losses of a few steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    opt = layerlr.SGD(model.named_parameters(), lr=0.5, rule=rule, fused=fused)
    opt.attach(model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    found = []
    for _ in range(5):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward(create_graph=opt.is_second_order)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        found += [loss.detach(), *opt.layer_stats()["scale"]]
    return torch.stack([f.double() for f in found])


@pytest.mark.filterwarnings("ignore:.*create_graph", "ignore:rule 'curvature' finds the length")
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("rule", ESTIMATED, ids=str)
def test_rates_that_are_estimated_do_not_see_the_scale(rule, fused):
    wanted = estimated_run(rule, fused, scaled=False)
    torch.testing.assert_close(estimated_run(rule, fused, scaled=True), wanted, rtol=1e-4, atol=0)
    if not rule.second_order:
        other = estimated_run(rule, fused, scaled=True, unscale=True)
        torch.testing.assert_close(other, wanted, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:.*create_graph", "ignore:rule 'curvature' finds the length")
@pytest.mark.parametrize("kind", ["hessian", "exact"])
def test_unscaled_gradients_have_another_graph(kind):
    with pytest.raises(RuntimeError, match="has divided their values, not their graph"):
        estimated_run(rules.Curvature(kind), fused=False, scaled=True, unscale=True)


def test_an_overflow_is_nothing_to_look_at():
    (p,) = (nn.Parameter(torch.ones(2, 2)),)
    opt = layerlr.SGD([p], lr=1.0, rule="curvature", fused=True)
    p.grad = torch.ones_like(p)
    told(opt, None, True)
    before = p.detach().clone()
    opt.step()
    assert torch.equal(p, before) and opt.param_groups[0].get("estimated", 0) == 0
