"""`layerlr.wrap` beside an oracle written apart from it: every base, every rule, every engine."""

from __future__ import annotations

import pytest
import torch
from cases import Engine, copies, random, same_bits, set_grads, train
from torch import nn
from torch.nn import Parameter
from wrapped import BASES, NARROW, RULES, SHAPES, Oracle, base_param, compare, values, wrapped

import layerlr
from layerlr import rules

#: Pairs instead of the product. A rule sees the weights before and after (in update order) or the
#: gradient (in gradient order), never the base; a base sees gradients, never the rule. So every
#: base meets one rule of each order, and every rule one base with decay in its step and another
#: whose step is elementwise.
BOTH = ("layca", "lars")
PAIRS = [(base, rule) for base in BASES for rule in BOTH]
PAIRS += [(base, rule) for base in ("sgd", "adamw") for rule in RULES if rule not in BOTH]
PAIRS += [("muon", "hyperball"), ("soap", "relative"), ("lion", "brake"), ("rmsprop", "singh")]
ROWS = [pytest.param(*base_param(b).values, r, marks=base_param(b).marks) for b, r in PAIRS]


@pytest.mark.parametrize(("base", "rule"), ROWS)
def test_equals_the_oracle(base, rule):
    dtype, rtol = (torch.float32, 1e-4) if base in NARROW else (torch.float64, 1e-11)
    params = [Parameter(v) for v in values(base, dtype)]
    oracle = Oracle(base, rule, params, dtype)
    compare(wrapped(base, rule, params, "cpu"), params, oracle, 20, rtol)


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_oracle_on_the_reference(rule):
    params = [Parameter(v) for v in values("adamw")]
    oracle = Oracle("adamw", rule, params)
    compare(wrapped("adamw", rule, params, "reference"), params, oracle, 20, 1e-11)


@pytest.mark.asked(triton=None)
@pytest.mark.parametrize("rule", ["layca", "hyperball", "brake", "lars", "singh"])
def test_equals_the_oracle_on_every_engine(engine, rule):
    """In float32, where u = v - w is known to an ulp of the weights."""
    params = engine.params(values("sgd", torch.float32))
    oracle = Oracle("sgd", rule, [p.cpu() for p in params])
    compare(wrapped("sgd", rule, params, engine.backend), params, oracle, 5, 2e-6)


def test_engines_agree():
    """Where cpu and reference measure alike: the same weights to 2 ulp."""
    found = []
    for backend in ("cpu", "reference"):
        params = Engine(backend, "cpu").params(values("adamw", torch.float32))
        train(wrapped("adamw", "hyperball", params, backend), params, 5)
        found.append(params)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-7, atol=1e-7)


# -- ours inside -----------------------------------------------------------------------------------

OURS = {
    "sgd": (layerlr.SGD, {"lr": 0.1}),
    "nag": (layerlr.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (layerlr.Adam, {"lr": 0.01}),
    "rmsprop": (layerlr.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}
UPDATE = ["layca", "hyperball", "lamb", "relative", "layca-cap", "hyperball-1.5", "brake", "rated"]


def beside_the_class(family, rule, dtype, steps=20):
    """The largest relative distance of a layer between wrapper and built-in class."""
    cls, args = OURS[family]
    row = RULES[rule]
    first, second = ([Parameter(v) for v in random(SHAPES, dtype)] for _ in range(2))
    base = cls(first, **args)
    opt = layerlr.wrap(base, row.rule, lr=row.lr)
    own = {"lr": row.lr, "plain_lr": args["lr"]} if row.lr else {}
    other = cls(second, **{**args, **own}, rule=row.rule)
    train(opt, first, steps)
    train(other, second, steps)
    return max(
        float(((p.double() - q.double()).norm() / q.double().norm()).detach())
        for p, q in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("rule", UPDATE)
@pytest.mark.parametrize("family", OURS)
def test_update_rules_equal_the_built_in_class(family, rule):
    """The step is known to an ulp of the weights: eps*|w|/|u| of its length."""
    assert beside_the_class(family, rule, torch.float64) < 1e-12
    assert beside_the_class(family, rule, torch.float32) < 2e-6


@pytest.mark.parametrize("rule", ["singh", "lars"])
@pytest.mark.parametrize("family", ["sgd", "nag"])
def test_gradient_rules_equal_the_built_in_class(family, rule):
    """Where the first-order buffers see f*g in both; f*g is rounded before the base sees it."""
    assert beside_the_class(family, rule, torch.float64) < 1e-14
    assert beside_the_class(family, rule, torch.float32) < 1e-6


def test_a_wrapper_in_a_wrapper():
    """LARS sees the gradients, the brake what came of them."""
    params = [Parameter(v) for v in random(SHAPES)]
    opt = layerlr.wrap(wrapped("sgd", "lars", params), rules.Brake(outward=0.0))
    norms = [p.detach().norm() for p in params]
    train(opt, params, 3)
    for p, norm in zip(params, norms, strict=True):
        assert p.dim() < 2 or p.detach().norm() <= norm * (1 + 1e-12)
    assert all(torch.isfinite(p).all() for p in params)


# -- layers ----------------------------------------------------------------------------------------


def test_split_tensors_are_layers_of_their_own():
    v = random([(6, 5)])[0]
    whole, parts = Parameter(v.clone()), [Parameter(x.clone()) for x in v.split([2, 4])]
    one = torch.optim.Adam([{"params": [whole], "split": [2, 4]}], lr=0.01)
    two = torch.optim.Adam(parts, lr=0.01)
    one, two = (layerlr.wrap(o, "layca", lr=0.1) for o in (one, two))
    for seed in range(5):
        set_grads([whole], seed)
        for p, g in zip(parts, whole.grad.split([2, 4]), strict=True):
            p.grad = g.clone()
        one.step()
        two.step()
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-13, atol=0)


@pytest.mark.parametrize("rule", ["lars", "layca"])
def test_layers_of_a_module(rule):
    """Weight and bias turn together, by one factor."""
    model = nn.Linear(5, 4).double()
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    row = RULES[rule]
    opt = layerlr.wrap(base, row.rule, lr=row.lr, layers="module", adapt="all")
    params = list(model.parameters())
    set_grads(params, 0)
    flat = torch.cat([p.detach().flatten() for p in params])
    g = torch.cat([p.grad.flatten() for p in params])
    opt.step()
    now = torch.cat([p.detach().flatten() for p in params])
    if rule == "lars":
        wanted = flat - 0.1 * row.formula(flat, g) * g
    else:
        wanted = row.formula(flat, 0.1 * g, 0.05, flat.norm())
    torch.testing.assert_close(now, wanted, rtol=1e-12, atol=1e-14)
    assert opt.layer_stats()["names"] == ["(root)"]


@pytest.mark.parametrize("rule", ["layca", "relative", "brake"])
def test_lr_factor(rule):
    row = RULES[rule]
    params = [Parameter(v) for v in random(((7, 5), (6, 4)))]
    before = copies(params)
    base = torch.optim.SGD([{"params": params, "lr_factor": [0.5, 0.0]}], lr=0.1)
    opt = layerlr.wrap(base, row.rule, lr=row.lr)
    set_grads(params, 0)
    opt.step()
    v, u = before[0], 0.1 * params[0].grad
    if rule == "brake":
        wanted = row.formula(v, 0.5 * u, None, None)
    else:
        wanted = row.formula(v, u, 0.5 * row.lr, v.norm())
    torch.testing.assert_close(params[0].detach(), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(params[1].detach(), before[1], rtol=1e-15, atol=0)


def test_lr_factor_is_refused_where_it_could_do_nothing():
    (p,) = (Parameter(v) for v in random(((7, 5),)))
    opt = layerlr.wrap(torch.optim.SGD([{"params": [p], "lr_factor": 0.5}], lr=0.1), "lars")
    set_grads([p], 0)
    before = copies([p])
    with pytest.raises(ValueError, match=r"lr_factor=0\.5 has no effect under rule 'lars'"):
        opt.step()
    assert same_bits([p], before)


def test_groups_have_rules_and_rates_of_their_own():
    a, b, c = (Parameter(v) for v in random(((7, 5), (6, 4), (3, 3))))
    groups = [
        {"params": [a]},
        {"params": [b], "rule": None, "lr": 0.2},
        {"params": [c], "rule": "lars"},
    ]
    opt = layerlr.wrap(torch.optim.SGD(groups, lr=0.1), "layca", lr=0.05)
    before = copies([a, b, c])
    set_grads([a, b, c], 0)
    opt.step()
    torch.testing.assert_close(
        a.detach(), RULES["layca"].formula(before[0], a.grad, 0.05, before[0].norm())
    )
    torch.testing.assert_close(b.detach(), before[1] - 0.2 * b.grad)
    f = 1e-3 * before[2].norm() / c.grad.norm()
    torch.testing.assert_close(c.detach(), before[2] - 0.1 * f * c.grad)
    assert [g["lr"] for g in opt.param_groups] == [0.05, 0.05, 0.1]
    for group in opt.param_groups:
        group["lr"] /= 2  # what has no rule follows
    before = copies([a, b, c])
    opt.step()
    torch.testing.assert_close(b.detach(), before[1] - 0.1 * b.grad)


def test_bfloat16():
    """The rule's factor is rounded with the product; u is what rounding left of the step."""
    params = [Parameter(v) for v in random(SHAPES, torch.bfloat16)]
    before, grads = copies(params), None
    opt = wrapped("sgd", "lars", params)
    set_grads(params, 0)
    grads = [p.grad.double() for p in params]
    opt.step()
    other = [Parameter(v) for v in before]
    for p, v, g in zip(other, before, grads, strict=True):
        f = RULES["lars"].formula(v.double(), g) if p.dim() >= 2 else 1.0
        p.grad = (g * f).bfloat16()
    torch.optim.SGD(other, lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert same_bits(params, other)

    params = [Parameter(v) for v in before]
    opt = wrapped("sgd", "layca", params)
    set_grads(params, 0)
    opt.step()
    for p, v in zip(params, before, strict=True):
        if p.dim() >= 2:
            assert abs(p.double().norm() / v.double().norm() - 1) < 4e-3
            assert opt.layer_stats()["angle"].tolist() == pytest.approx([0.05 - 4e-5] * 2, rel=1e-3)
