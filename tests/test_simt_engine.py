"""The CUDA engine through Python, run on the CPU: schedules, traffic, what steps may change."""

from __future__ import annotations

import ctypes
import random

import cases
import layouts
import pytest
import simt_engine
import torch
from bench import roofline
from cases import BY_ID, RULE_ROWS, SHORT, copies, ids, same_bits, same_state, set_grads, state_of
from torch.nn import Parameter

import layerlr
from layerlr.backends import BACKENDS
from layerlr.backends.cuda import Tuning, tuning

missing = simt_engine.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")

TUNINGS = [
    *(Tuning(blocks=n) for n in (1, 2, 7, 16)),
    *(Tuning(blocks=3, hold=n) for n in (1, 2, 100)),
    Tuning(plain=True),
    Tuning(blocks=5, plain=True),
]
#: elements of a tile here: 64 threads, 8 of each, 4 in float64
TILE = {torch.float32: 512, torch.bfloat16: 512, torch.float64: 256}


class Traffic(ctypes.Structure):
    """simt::Traffic"""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("loaded", "stored", "reads", "writes", "copies", "fresh")
    ]


def of_emulation(kind, mangled):
    """A global variable of the emulation."""
    return kind.in_dll(ctypes.CDLL(BACKENDS["simt"].module().__file__), mangled)


@pytest.fixture
def traffic():
    return of_emulation(Traffic, "_ZN4simt7trafficE")


@pytest.fixture
def seed():
    """Order in which blocks and threads run."""
    seed = of_emulation(ctypes.c_uint, "_ZN4simt4seedE")
    yield seed
    seed.value = 0


def train(case, values, steps=2, *, how=Tuning(), backend="simt", layout=layouts.plain, **kwargs):
    """Parameters, their states, the statistics of layers."""
    params = [Parameter(layout(v)) for v in values]
    with tuning(**how._asdict()):
        opt = case.make(params, backend=backend, **kwargs)
        cases.train(opt, params, steps)
    stats = opt.layer_stats()
    return (
        copies(params),
        [state_of(opt, p) for p in params],
        [v for v in stats.values() if isinstance(v, torch.Tensor)],
    )


def same(a, b):
    return same_bits(a[0], b[0]) and all(map(same_state, a[1], b[1])) and same_bits(a[2], b[2])


# -- schedules change nothing ---------------------------------------------------------------------

#: layers of hundreds of tiles, of one, of less, of nothing
SHAPES = ((250, 400), (33, 700), (5,), (), (0, 3), (511,), (2, 513), (40, 100))
MIXED = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("case", SHORT, ids=ids(SHORT))
def test_schedules_change_no_bit(case, dtype):
    values = cases.random(SHAPES)
    values = [v.to(dtype or MIXED[i % len(MIXED)]) for i, v in enumerate(values)]
    layout = layouts.plain if dtype is None else layouts.shifted
    one, *others = [train(case, values, how=how, layout=layout) for how in TUNINGS]
    for how, other in zip(TUNINGS[1:], others):
        assert same(one, other), how


def test_runs_repeat_to_the_bit(seed):
    values = cases.random(SHAPES, torch.float32)
    for name in ("nag-lars", "adamw-layca"):
        runs = []
        for seed.value in range(20):
            runs.append(train(BY_ID[name], values))
            assert same(runs[0], runs[-1])


@pytest.mark.parametrize("seed", range(12))
def test_random_models_equal_the_cpu_engine(seed):
    """Without a rule to the bit; with one nearly, as their sums are added in another order."""
    draw = random.Random(seed)
    n = draw.randint(1, 12)
    shapes = [(draw.choice((1, 3, 8)), draw.choice((0, 1, 7, 64, 512, 3333))) for _ in range(n)]
    values = cases.random(shapes, seed=seed)
    dtypes = draw.choice((MIXED, MIXED[:1], MIXED[1:2]))
    values = [v.to(draw.choice(dtypes)) for v in values]
    layout = draw.choice((layouts.plain, layouts.shifted))
    joined = [draw.randrange(n) for _ in range(n)]
    kwargs = {"layers": lambda name, _: joined[int(name.partition(".")[0])], "adapt": "all"}
    del kwargs
    how = Tuning(draw.choice((0, 1, 3, 16)), draw.choice((0, 0, 3)), draw.random() < 0.2)
    bare = draw.choice([case for case in SHORT if case.rule is None])
    skip = draw.choice(("propagate", "skip"))
    ours, twin = (
        train(bare, values, 3, how=how, backend=b, layout=layout, on_nonfinite=skip)
        for b in ("simt", "cpu")
    )
    assert same_bits(ours[0], twin[0])
    assert all(map(same_state, ours[1], twin[1]))
