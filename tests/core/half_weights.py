"""16-bit weights under each precision, with and without rules."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import state_of

import layerlr

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KEYS = {"master": "master", "kahan": "compensation", "stochastic": "rounding_seed"}
ULP = 2**-7  # of bfloat16 between 1 and 2
each_precision = pytest.mark.parametrize("precision", KEYS)
DIRECTIONS = {
    "sgd": (layerlr.SGD, {"lr": 0.01}),
    "momentum": (layerlr.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (layerlr.AdamW, {"lr": 0.003, "weight_decay": 0.2}),
}
SHAPES = ((7, 5), (33,), (2, 3, 2, 2), (), (0, 3), (40, 30))


def halves(engine, half=BF16, shapes=SHAPES, seed=0):
    return engine.params(cases.random(shapes, seed=seed), half)


def held(opt, params, key):
    return [opt.state[p][key] for p in params]


def photograph(opt, params):
    return [t for p in params for t in (p.detach().clone(), *state_of(opt, p).values())]
