"""Bounds of LAMB under `layerlr.wrap`: on the ratio to what the base's step is at an lr of 1."""

from __future__ import annotations

import math

import pytest
import torch
from cases import copies, random, set_grads, train
from torch.nn import Parameter

import layerlr
from layerlr.rules import Lamb, Relative

SHAPES = ((7, 5), (33,), (2, 3, 2, 2), (4, 4), (3, 3))
#: with these parameters some layers meet the one bound, some the other, and one neither
BOUNDS = [
    Lamb(min_ratio=0.5),
    Lamb(max_ratio=0.9),
    Lamb(min_ratio=0.6, max_ratio=1.2),
    Lamb(trust_clip=True, clip=5.0),
    Relative(min_ratio=0.6, max_ratio=1.2),
]
NAMES = ["floor", "cap", "both", "timm", "relative"]
every_bound = pytest.mark.parametrize("rule", BOUNDS, ids=NAMES)


def params_of(dtype=torch.float64):
    """Matrices of small and large norms, one of zeros, a vector."""
    params = [Parameter(v.to(dtype)) for v in random(SHAPES)]
    params[0].data *= 0.2
    params[2].data *= 3.0
    params[4].data *= 0.0
    return params


def adam(params, lr=0.01):
    return torch.optim.Adam(params, lr=lr, betas=(0.8, 0.95))


def ratio(rule, v, u):
    """As the paper's algorithm 2 has it, with bounds."""
    if not (v.norm() > 0 and u.norm() > 0):
        return 1.0
    r = min(float(v.norm()), rule.clip or math.inf) / float(u.norm())
    most = min(rule.max_ratio or math.inf, 1.0 if rule.trust_clip else math.inf)
    return min(max(r, rule.min_ratio or 0.0), most)


@pytest.mark.asked(triton=None)
@every_bound
def test_bounds_of_lamb(engine, rule):
    """20 steps beside a base whose step is scaled by hand; lr follows a schedule."""
    values = [p.detach() for p in params_of()]
    ours, theirs = engine.params(values), [Parameter(v.clone()) for v in values]
    base = adam(theirs)
    opt = layerlr.wrap(adam(ours), rule, backend=engine.backend)
    found = set()
    for step in range(20):
        lr = 0.01 * (step + 1) / 4
        opt.param_groups[0]["lr"] = base.param_groups[0]["lr"] = lr
        set_grads(theirs, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad.to(p)
        before = copies(theirs)
        opt.step()
        base.step()
        for p, q, v in zip(ours, theirs, before, strict=True):
            if q.dim() >= 2:
                u = (v - q.detach()) / lr
                r = ratio(rule, v, u)
                found.add(round(r, 9))
                q.data.copy_(v - lr * r * u)
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-10, atol=1e-13)
    bounds = {rule.min_ratio, rule.max_ratio, 1.0 if rule.trust_clip else None} - {None}
    assert bounds <= found and len(found) > len(bounds)


@every_bound
@pytest.mark.parametrize(("cls", "args"), [(layerlr.Adam, {}), (layerlr.SGD, {"momentum": 0.9})])
def test_ours_inside_are_the_built_in_class(cls, args, rule):
    first, second = params_of(), params_of()
    opt = layerlr.wrap(cls(first, lr=0.02, **args), rule)
    other = cls(second, lr=0.02, rule=rule, **args)
    train(opt, first, 10)
    train(other, second, 10)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)
    wanted = other.layer_stats()
    for key, value in opt.layer_stats().items():
        if key in ("scale", "lr", "ww", "uu", "wu"):  # gg is of weights there
            torch.testing.assert_close(value, wanted[key][[0, 2, 3, 4]], rtol=1e-8, atol=1e-12)


def test_a_rate_of_zero_moves_nothing():
    params = params_of()
    opt = layerlr.wrap(adam(params), BOUNDS[2])
    opt.param_groups[0]["lr"] = 0.0
    before = copies(params)
    train(opt, params, 2)
    assert all(torch.equal(p, v) for p, v in zip(params, before, strict=True))
    opt.param_groups[0]["lr"] = 0.01
    train(opt, params, 1)
    assert not any(torch.equal(p, v) for p, v in zip(params, before, strict=True))


def test_the_lr_is_the_bases():
    """As under every rule that does not set the length of the step."""
    params = params_of()
    opt = layerlr.wrap(adam(params, lr=0.03), BOUNDS[0])
    assert opt.param_groups[0]["lr"] == 0.03 and "reference_lr" not in opt.param_groups[0]
    assert layerlr.wrap(adam(params, lr=0.03), "lamb", lr=0.1).param_groups[0]["lr"] == 0.1
