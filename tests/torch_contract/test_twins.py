"""Without a rule each optimizer is its torch.optim twin, whatever the options."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import same_bits
from contract_helpers import IN_TORCH, TWINS
from selection import NONE
from torch.nn import Parameter
from torch.optim import lr_scheduler

import layerlr

# Without a rule every engine has the reference's bits (test_parity.py).
pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)

STEPS = 50
#: float32 and float64 side by side: half the steps, and an optimizer of mixed dtypes
REAL = (torch.float32, torch.float64, torch.float32, torch.float64, torch.float32)
COMPLEX = (torch.complex64, torch.complex128)
SHAPES = ((6, 5), (5, 6), (), (2,), (0, 3))


def tensor_lr():
    # float64: torch computes with it in its own dtype
    return torch.tensor(0.01, dtype=torch.float64)


def tensor_betas():
    return torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)


#: class -> options; a callable value is called for each optimizer
OPTIONS = {
    layerlr.SGD: [
        {},
        {"lr": 0.1},
        {"lr": 0.0},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "dampening": 1.0},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"lr": tensor_lr},
        {"lr": tensor_lr, "momentum": 0.9, "dampening": 0.1},
    ],
    layerlr.AMomSGD: [
        {},
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.0},
        {"lr": 0.1, "momentum": 1.0},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr": tensor_lr},
    ],
    layerlr.Adagrad: [
        {},
        {"lr": 0.1, "lr_decay": 0.1},
        {"lr": 0.1, "initial_accumulator_value": 0.5},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "eps": 0.1, "maximize": True, "weight_decay": 0.1},
        {"lr": tensor_lr, "lr_decay": 0.1},
    ],
    layerlr.RMSprop: [
        {},
        {"lr": 0.05, "alpha": 0.5},
        {"lr": 0.05, "eps": 0.1, "weight_decay": 0.1},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "centered": True, "alpha": 0.9},
        {"lr": 0.05, "centered": True, "momentum": 0.9, "alpha": 0.9},
        {"lr": 0.05, "maximize": True, "weight_decay": 0.1, "momentum": 0.5},
        {"lr": tensor_lr, "momentum": 0.1},
    ],
    layerlr.Adam: [
        {},
        {"lr": 0.05, "betas": (0.5, 0.9)},
        {"lr": 0.05, "betas": (0.0, 0.0)},
        {"lr": 0.05, "betas": tensor_betas},
        {"lr": 0.05, "eps": 0.1},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.05, "amsgrad": True, "betas": (0.9, 0.5)},
        {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"lr": tensor_lr},
    ],
    layerlr.AdamW: [
        {},
        {"lr": 0.05, "weight_decay": 0.0},
        {"lr": 0.05, "weight_decay": 0.2, "eps": 0.1},
        {"lr": 0.05, "betas": (0.5, 0.9), "amsgrad": True},
        {"lr": 0.05, "maximize": True},
        {"lr": tensor_lr, "weight_decay": 0.2},
    ],
    layerlr.Lion: [
        {},
        {"lr": 0.05, "weight_decay": 0.2},
        {"lr": 0.05, "betas": (0.5, 0.9), "maximize": True},
        {"lr": 0.05, "betas": (0.9, 0.9)},
        {"lr": 0.05, "betas": (0.9, 0.5)},
        {"lr": 0.05, "betas": (0.0, 0.9), "weight_decay": 0.1, "maximize": True},
        {"lr": 0.05, "betas": tensor_betas},
        {"lr": tensor_lr},
    ],
}
ROWS = [
    pytest.param(cls, options, id=f"{cls.__name__}-{i}")
    for cls, rows in OPTIONS.items()
    for i, options in enumerate(rows)
]
GROUPED = {
    layerlr.SGD: ("momentum", [{}, {"momentum": 0.9, "lr": 0.02}, {"weight_decay": 0.3}]),
    layerlr.AMomSGD: ("momentum", [{}, {"momentum": 0.5, "maximize": True}, {"lr": 0.3}]),
    layerlr.Adagrad: ("lr", [{}, {"eps": 0.3, "lr": 0.2}, {"lr_decay": 0.3}]),
    layerlr.RMSprop: ("momentum", [{}, {"centered": True, "alpha": 0.9}, {"momentum": 0.9}]),
    layerlr.Adam: ("betas", [{}, {"betas": (0.5, 0.9)}, {"amsgrad": True, "maximize": True}]),
    layerlr.AdamW: ("betas", [{}, {"weight_decay": 0.5}, {"eps": 0.5, "lr": 0.3}]),
    layerlr.Lion: ("betas", [{}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.5, "lr": 0.3}]),
}


def built(options):
    return {k: v() if callable(v) else v for k, v in options.items()}


def values(dtypes, seed):
    """Weights or gradients, complex where their dtype is."""
    real, imaginary = cases.random(SHAPES, seed=seed), cases.random(SHAPES, seed=seed + 500)
    both = zip(dtypes, real, imaginary)
    return [torch.complex(x, y).to(d) if d.is_complex else x.to(d) for d, x, y in both]


def assert_near(a, b, size):
    """Equal to rounding.

    Both round each step a few times, not alike: torch uses fused operations (lerp, addcmul) and
    another order, and rounds its scalars elsewhere. A scalar is off by eps/4 at most, always the
    same way: 50 steps add up to 12 eps of the largest value on the way (9 measured), the other
    roundings to less. 1e-12 is 4500 eps of float64.
    """
    a, b = a.detach().cpu(), b.detach().cpu()
    assert a.dtype == b.dtype and a.shape == b.shape
    eps = torch.finfo(a.dtype).eps
    bound = size * (16 * eps if eps > 1e-10 else 1e-12)
    assert bool(((a - b).abs() <= bound).all()), ((a - b).abs() / bound).max()


class Pair:
    """An optimizer and its twin on the same weights, stepped on the same gradients."""

    def __init__(self, engine, cls, options, dtypes=REAL, groups=None):
        self.dtypes = dtypes
        start = values(dtypes, seed=4)
        self.ours = engine.params(start)
        self.theirs = [Parameter(v.clone()) for v in start]

        def grouped(params):
            if groups is None:
                return params
            return [{"params": params[i::3], **group} for i, group in enumerate(groups)]

        self.opt = cls(grouped(self.ours), **built(options), backend=engine.backend)
        self.twin = TWINS[cls](grouped(self.theirs), **built(options))
        self.schedulers = []
        self.largest = [v.abs() for v in start]

    def step(self, seed, change=lambda grads: None):
        grads = values(self.dtypes, seed)
        change(grads)
        for p, q, g in zip(self.ours, self.theirs, grads):
            p.grad, q.grad = g.to(p.device), g
        self.opt.step()
        self.twin.step()
        for scheduler in self.schedulers:
            scheduler.step()
        now = [p.detach().abs() for p in self.theirs]
        self.largest = [torch.maximum(a, b) for a, b in zip(self.largest, now)]

    def run(self, steps=STEPS):
        for seed in range(steps):
            self.step(seed)
        for p, q, size in zip(self.ours, self.theirs, self.largest):
            assert_near(p, q, size)
            mine, its = self.opt.state[p], self.twin.state[q]
            assert its.keys() <= mine.keys()
            for key in its.keys() - {"step"}:
                if its[key] is not None and its[key].numel():
                    assert_near(mine[key], its[key], max(its[key].abs().max().item(), 1.0))
            if "step" in its:
                assert float(mine["step"]) == float(its["step"])


@pytest.mark.parametrize(("cls", "options"), ROWS)
def test_equals_its_twin(engine, cls, options):
    Pair(engine, cls, options).run()


@pytest.mark.parametrize("cls", GROUPED)
def test_groups_with_their_own_hyper_parameters(engine, cls):
    Pair(engine, cls, {"lr": 0.05}, groups=GROUPED[cls][1]).run()


@pytest.mark.parametrize("cls", GROUPED)
def test_scheduled(engine, cls):
    cycled = GROUPED[cls][0]
    options = {"lr": 0.05, **({"momentum": 0.9} if cycled == "momentum" else {})}
    pair = Pair(engine, cls, options)
    seen = set()
    for opt in (pair.opt, pair.twin):
        pair.schedulers.append(
            lr_scheduler.OneCycleLR(opt, 0.1, STEPS + 1, cycle_momentum=cycled != "lr")
        )
    pair.opt.register_step_pre_hook(lambda opt, *_: seen.add(str(opt.param_groups[0][cycled])))
    pair.run()
    assert len(seen) > STEPS // 2  # the scheduler did change what it should


@pytest.mark.parametrize("cls", IN_TORCH)
def test_complex_parameters(engine, cls):
    for options in OPTIONS[cls]:
        Pair(engine, cls, options, COMPLEX).run(5)


@pytest.mark.parametrize("options", OPTIONS[layerlr.Lion][:6])
def test_lion_of_pytorch_optimizer(engine, options):
    package = pytest.importorskip("pytorch_optimizer", reason="its Lion is the twin")
    options = {"lr": 1e-4, "betas": (0.9, 0.99), **options}
    pair = Pair(engine, layerlr.Lion, options)
    pair.twin = package.Lion(pair.theirs, foreach=False, **options)
    pair.run()


@pytest.mark.parametrize("case", cases.SHORT, ids=cases.ids(cases.SHORT))
def test_flags_never_change_the_numbers(engine, case):
    flags = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}]
    if case.kind == "RMSprop":
        flags = flags[:3]  # torch's has no fused
    results = []
    for flag in flags:
        params = engine.params(values((*cases.DTYPES, torch.float32), 4))
        cases.train(engine.make(case, params, **flag), params, 2)
        results.append(params)
    for flag, result in zip(flags, results):
        assert same_bits(result, results[0]), flag


@pytest.mark.parametrize("cls", TWINS)
def test_propagates_what_is_not_finite(engine, cls):
    def spoil(grads):
        grads[0][0, 0], grads[0][1, 1], grads[3][0] = float("nan"), float("inf"), -float("inf")

    pair = Pair(engine, cls, {"lr": 0.05, "weight_decay": 0.1})
    pair.step(0)
    pair.step(1, spoil)
    bad = 0
    for p, q in zip(pair.ours, pair.theirs):
        # rounding aside, the same elements are NaN or infinite
        torch.testing.assert_close(p.detach().cpu(), q.detach(), equal_nan=True)
        bad += int((~torch.isfinite(p)).sum())
    assert bad
