"""``plain_lr``: the rate of what the rule does not govern, scheduled along with lr."""

from __future__ import annotations

import copy
import io
import math
import pickle

import cases
import pytest
import torch
from cases import OWN, RULED, SHORT, copies, ids, random, same_bits, set_grads, train
from selection import NONE
from spec import Spec
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import layerlr
from layerlr.rules import Layca

SHAPES = ((4, 3), (4,), (1, 1, 5), (2, 4))
#: where the plain parameters move
MOVING = [c for c in SHORT if c in RULED and c not in OWN]
MOVING = [c for c in MOVING if getattr(c.rule, "others", "") != "freeze"]


def weights(dtype=torch.float64):
    return [Parameter(v) for v in random(SHAPES, dtype, seed=4)]


def rates(opt):
    """The lr of each parameter, as `layerlr.describe` tells it."""
    rows = [line.split("  ") for line in layerlr.describe(opt).splitlines()[1:]]
    return [float([cell for cell in row if cell][-3]) for row in rows]


@pytest.mark.parametrize("case", MOVING, ids=ids(MOVING))
def test_against_the_formulas(engine, case):
    params = engine.params(random(SHAPES, seed=4))
    lr = case.args["lr"]
    opt = engine.make(case, params, plain_lr=3.0 * lr)
    spec = Spec(case.kind, opt.param_groups[0], params, plain=3.0)
    for seed in range(3):
        set_grads(params, seed)
        spec.follow(opt, params)
        spec.step([p.grad for p in params])
        opt.step()
        spec.check(params, opt)
        opt.param_groups[0]["lr"] *= 0.5  # as schedulers do


@pytest.mark.asked(triton=NONE)
@pytest.mark.parametrize("cls", cases.CLASSES)
def test_equals_a_group_of_its_own(engine, cls):
    """Bits: the plain parameters are those of an optimizer without a rule at that rate."""
    ours, apart = (engine.params(random(SHAPES, seed=4)) for _ in range(2))
    opt = cls(ours, lr=0.25, rule="layca", plain_lr=0.0625, backend=engine.backend)
    twin = cls(apart[1:3], lr=0.0625, backend=engine.backend)
    for seed in range(3):
        set_grads(ours, seed)
        for p, q in zip(ours, apart):
            q.grad = p.grad.clone()
        opt.step()
        twin.step()
        for o in (opt, twin):
            o.param_groups[0]["lr"] *= 0.5
    assert same_bits(ours[1:3], apart[1:3])


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_follows_a_scheduler_that_starts_low(lr):
    opt = layerlr.SGD(weights(), lr=lr, rule="layca", plain_lr=0.5)
    schedule = LambdaLR(opt, lambda t: min(1.0, t / 4))
    for step in range(6):
        part = min(1.0, step / 4)
        assert rates(opt) == pytest.approx([0.02 * part, 0.5 * part, 0.5 * part, 0.02 * part])
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["reference_lr"] == pytest.approx(0.02)


def test_follows_one_cycle():
    opt = layerlr.SGD(weights(), lr=0.02, momentum=0.9, rule="layca", plain_lr=0.5)
    schedule = OneCycleLR(opt, max_lr=0.02, total_steps=10)
    seen = []
    for _ in range(9):
        seen.append(rates(opt)[1])
        opt.step()
        schedule.step()
    assert max(seen) == pytest.approx(0.5, rel=1e-3) and seen[0] == pytest.approx(0.02, rel=1e-3)


def test_lr_factor_goes_on_top():
    a, b, c, d = weights()
    groups = [{"params": [a, b], "lr_factor": 0.5}, {"params": [d, c], "lr_factor": [2.0]}]
    opt = layerlr.SGD(groups, lr=0.1, rule="layca", plain_lr=0.3)
    # a list is for governed layers alone
    assert rates(opt) == pytest.approx([0.05, 0.15, 0.2, 0.3])


def test_decoupled_decay_is_at_the_plain_rate(engine):
    params = engine.params([torch.ones(4, 3), torch.ones(4)], torch.float64)
    options = {"weight_decay": 0.5, "rule": "layca", "backend": engine.backend}
    opt = layerlr.AdamW(params, lr=0.01, plain_lr=0.1, **options)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    torch.testing.assert_close(params[1].detach(), torch.full_like(params[1], 0.95))


# -- groups --------------------------------------------------------------------------------------


def test_groups_without_a_rule_take_it_unless_they_have_an_lr():
    a, b, c, d = weights()
    groups = [
        {"params": [a]},
        {"params": [b], "rule": None},
        {"params": [c], "rule": None, "lr": 0.7},
        {"params": [d], "rule": None, "lr": 0.2, "plain_lr": 0.9},
    ]
    opt = layerlr.SGD(groups, lr=0.1, rule="layca", plain_lr=0.3)
    assert rates(opt) == pytest.approx([0.1, 0.3, 0.7, 0.9])
    for group in opt.param_groups:
        group["lr"] *= 0.5
    assert rates(opt) == pytest.approx([0.05, 0.15, 0.35, 0.45])


def test_a_group_that_is_added_late_has_the_lr_of_then():
    a, b, c, _ = weights()
    opt = layerlr.SGD([a, b], lr=0.1, rule="layca", plain_lr=0.3)
    opt.param_groups[0]["lr"] = 0.01
    opt.add_param_group({"params": [c], "lr": 0.2})
    assert rates(opt) == pytest.approx([0.01, 0.03, 0.3])


def test_set_between_steps():
    ours, twins = weights(), weights()
    opt = layerlr.SGD(ours, lr=0.5, rule="layca")
    twin = layerlr.SGD(twins, lr=0.5, rule="layca", plain_lr=0.125)
    assert "reference_lr" not in opt.param_groups[0]
    opt.param_groups[0]["plain_lr"] = 0.125
    train(opt, ours, 2)
    train(twin, twins, 2)
    assert same_bits(ours, twins)
    opt.param_groups[0].update(lr=0.25, plain_lr=0.25)  # still at lr = 0.5
    assert rates(opt) == pytest.approx([0.25, 0.125, 0.125, 0.25])
    opt.param_groups[0]["reference_lr"] = 0.25
    assert rates(opt) == pytest.approx([0.25] * 4)
    opt.param_groups[0].update(lr=0.125)
    assert rates(opt) == pytest.approx([0.125] * 4)
    opt.param_groups[0].update(lr=0.25, plain_lr=None)
    assert rates(opt) == pytest.approx([0.25] * 4)


def test_frozen_others_stay_frozen():
    params = weights()
    before = copies(params)
    opt = layerlr.SGD(params, lr=0.1, rule=Layca(others="freeze"), plain_lr=0.3)
    train(opt, params, 1)
    moved = [not same_bits([p], [b]) for p, b in zip(params, before)]
    assert moved == [True, False, False, True]


# -- refusals ------------------------------------------------------------------------------------


def test_without_a_rule_it_is_refused():
    with pytest.raises(ValueError, match=r"plain_lr=0.3 is the rate .* there is no rule"):
        layerlr.SGD(weights(), lr=0.1, plain_lr=0.3)
    a, b, *_ = weights()
    groups = [{"params": [a], "rule": "layca"}, {"params": [b]}]
    assert rates(layerlr.SGD(groups, lr=0.1, plain_lr=0.3)) == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_an_lr_of_0_is_refused(lr):
    with pytest.raises(ValueError, match=r"plain_lr=0.3 follows lr .* group 0 is 0.0: give a non"):
        layerlr.SGD(weights(), lr=lr, rule="layca", plain_lr=0.3)
    groups = [{"params": weights(), "reference_lr": 0.1}]  # the other way out
    opt = layerlr.SGD(groups, lr=lr, rule="layca", plain_lr=0.3)
    opt.param_groups[0]["lr"] = 0.05
    assert rates(opt) == pytest.approx([0.05, 0.15, 0.15, 0.05])


@pytest.mark.parametrize("known", ["x", -1.0, math.inf])
def test_a_reference_that_is_none_is_named(known):
    groups = [{"params": weights(), "reference_lr": known}]
    with pytest.raises(ValueError, match="Invalid reference_lr of param group 0"):
        layerlr.SGD(groups, lr=0.1, rule="layca", plain_lr=0.3)


# -- persistence ---------------------------------------------------------------------------------


def by_state_dict(opt, build):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = build()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


WAYS = {
    "state dict": by_state_dict,
    "deepcopy": lambda opt, build: copy.deepcopy(opt),
    "pickle": lambda opt, build: pickle.loads(pickle.dumps(opt)),
}


@pytest.mark.parametrize("way", WAYS)
def test_comes_back_in_the_middle_of_a_schedule(way):
    def build(**options):
        return layerlr.Adam(weights(), rule="layca", **options)

    opt = build(lr=0.25, plain_lr=0.5)
    opt.param_groups[0]["lr"] = 0.125
    train(opt, opt.param_groups[0]["params"], 2)
    other = WAYS[way](opt, lambda: build(lr=0.3))
    ours, theirs = (o.param_groups[0]["params"] for o in (opt, other))
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            q.copy_(p)
    assert rates(other) == pytest.approx([0.125, 0.25, 0.25, 0.125])
    train(opt, ours, 2, seed=7)
    train(other, theirs, 2, seed=7)
    assert same_bits(ours, theirs)


def test_a_state_dict_without_it():
    """torch's, in the middle of a schedule: the ratio of the optimizer that loads it stays."""
    opt = layerlr.SGD(weights(), lr=0.1, rule="layca", plain_lr=0.3)
    saved = torch.optim.SGD(weights(), lr=0.01).state_dict()
    opt.load_state_dict(saved)
    assert rates(opt) == pytest.approx([0.01, 0.03, 0.03, 0.01])
    saved = opt.state_dict()
    del saved["param_groups"][0]["reference_lr"]
    other = layerlr.SGD(weights(), lr=0.1, rule="layca")
    other.load_state_dict(saved)  # nobody knows: the present lr
    assert rates(other) == pytest.approx([0.01, 0.3, 0.3, 0.01])


def test_tensors_are_read_once():
    lr = torch.tensor(0.1)
    opt = layerlr.SGD(weights(), lr=lr, rule="layca", plain_lr=torch.tensor(0.3))
    group = opt.param_groups[0]
    assert type(group["reference_lr"]) is float and type(group["plain_lr"]) is float
    lr.fill_(0.01)
    assert rates(opt) == pytest.approx([0.01, 0.03, 0.03, 0.01])
