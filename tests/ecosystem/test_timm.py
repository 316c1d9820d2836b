"""LARS and LAMB beside timm's, over the options that both have."""

from __future__ import annotations

import cases
import pytest
import torch
from selection import NONE
from wrapped import timm_optimizer

import layerlr
from layerlr.rules import Lamb, Lars

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


def walk_beside(engine, ours, theirs, steps=5):
    """Weights of both after some steps on the same gradients, in float64."""
    values = cases.random([(7, 5), (3, 2, 2)], seed=2)
    mine = engine.params(values)
    peers = [torch.nn.Parameter(v.clone()) for v in values]
    a, b = ours(mine), theirs(peers)
    for seed in range(steps):
        cases.set_grads(mine, seed)
        cases.set_grads(peers, seed)
        a.step()
        b.step()
    # timm takes its norms in the parameter's dtype: float64 rounding, 5 steps, sums of 35
    for x, y in zip(mine, peers, strict=True):
        torch.testing.assert_close(x.detach().cpu(), y.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_as_timm(engine, nesterov, wd):
    shared = {"lr": 0.5, "momentum": 0.9, "nesterov": nesterov, "weight_decay": wd}
    walk_beside(
        engine,
        lambda p: layerlr.SGD(p, **shared, rule=Lars(trust=0.02), backend=engine.backend),
        lambda p: timm_optimizer("Lars")(p, **shared, trust_coeff=0.02, always_adapt=True),
    )


@pytest.mark.parametrize("trust", [0.02, 2.0])
def test_lars_clip_as_timm(engine, trust):
    # LARC: min(ratio, lr) is the rate
    shared = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    rule = Lars(trust=trust, trust_clip=True)
    peer = {"trust_coeff": trust, "trust_clip": True}
    walk_beside(
        engine,
        lambda p: layerlr.SGD(p, **shared, rule=rule, backend=engine.backend),
        lambda p: timm_optimizer("Lars")(p, **shared, **peer),
    )


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize(
    "options", [{}, {"trust_clip": True}, {"bias_correction": False}, {"grad_averaging": False}]
)
def test_lamb_as_timm(engine, options, wd):
    shared = {"lr": 0.05, "weight_decay": wd, "betas": (0.8, 0.95), "eps": 1e-6}
    peer = {"always_adapt": True, "max_grad_norm": None, **options}
    walk_beside(
        engine,
        lambda p: layerlr.AdamW(p, **shared, rule=Lamb(**options), backend=engine.backend),
        lambda p: timm_optimizer("Lamb")(p, **shared, **peer),
    )
