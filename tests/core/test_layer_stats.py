"""What `layer_stats` and `describe` tell about the layers, against direct float64 sums."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import BY_ID, CASES, ids, random, set_grads
from spec import Spec, array, dot, norm

import layerlr
from layerlr.rules import Lamb

KEYS = ["names", "ww", "gg", "uu", "wu", "scale", "lr", "angle", "skipped"]
RULED = [c for c in CASES if c.rule is not None]


def turned(before, after):
    """Angle between two lists of arrays: exact for small angles too, unlike acos."""
    b, a = norm(before), norm(after)
    cos = dot(before, after) / (a * b)
    side = norm([y / a - cos * x / b for x, y in zip(before, after)])
    return math.atan2(side, cos)


@pytest.mark.parametrize("case", RULED, ids=ids(RULED))
def test_values(engine, wide, case):
    """ww, gg, uu, wu before the step, the rule's number, the effective rate, the angle."""
    params = engine.params(random(((4, 3), (3, 5), (6,)), seed=3), wide)
    # a rate of its own for each layer: 0 for the first
    governed = 3 if case.rule.adapts == "all" else 2
    lr_factor = [0.0, 0.5, 2.0][:governed]
    opt = engine.make(case, [{"params": params, "lr_factor": lr_factor}])
    spec = Spec(case.kind, opt.param_groups[0], params, lr_scale=lr_factor)
    # the sums are of float32 steps: 64 roundings of relative size eps, some of terms that cancel
    rel = 64 * torch.finfo(wide).eps
    for seed in range(2):
        before = [array(p) for p in params]
        set_grads(params, seed)
        spec.follow(opt, params)
        spec.step([p.grad for p in params])
        opt.step()
        stats = opt.layer_stats()
        assert list(stats) == KEYS
        for layer, expected in spec.stats.items():
            size = max(expected[0], 1.0) * max(expected[2], 1.0)
            for key, value in zip(KEYS[1:7], expected):
                got = stats[key][layer].item()
                slack = rel * size if key == "wu" else 0.0
                assert got == pytest.approx(value, rel=rel, abs=slack), (key, layer)
            moved = turned([before[layer]], [array(params[layer])])
            # weights are rounded after the step: an angle of half an eps, and a few in all
            slack = 8 * torch.finfo(wide).eps
            assert stats["angle"][layer].item() == pytest.approx(moved, rel=rel, abs=slack)
        assert stats["angle"][0] == 0.0


def test_angle_of_a_joined_layer(engine):
    params = engine.params(random(((4, 3), (4,)), seed=3))
    named = list(zip(("fc.weight", "fc.bias"), params))
    opt = layerlr.AdamW(
        named, lr=0.3, rule="lamb", layers="module", adapt="all", backend=engine.backend
    )
    for seed in range(2):
        before = [array(p) for p in params]
        set_grads(params, seed)
        opt.step()
        moved = turned(before, [array(p) for p in params])
        assert opt.layer_stats()["angle"].tolist() == pytest.approx([moved], rel=1e-12)


@pytest.mark.parametrize("rule", ["singh", "lars", "lamb", "layca"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_rows_outside_every_layer(engine, rule, decay):
    """Their gradient is measured with its L2 decay, also where the rule wants its own without."""
    params = engine.params(random(((4, 3), (5,)), seed=3))
    opt = layerlr.SGD(
        params, lr=0.1, weight_decay=decay, rule=rule, adapt="kernels", backend=engine.backend
    )
    set_grads(params, 0)
    before = [array(p) for p in params]
    grad = array(params[1].grad) + decay * before[1]
    opt.step()
    stats = opt.layer_stats()
    assert stats["scale"][1] == 1.0 and stats["lr"][1] == 0.1
    ww, gg = dot(before[1:], before[1:]), dot([grad], [grad])
    # sums of five terms in another order
    assert stats["ww"][1].item() == pytest.approx(ww, rel=1e-14)
    assert stats["gg"][1].item() == pytest.approx(gg, rel=1e-14)


@pytest.mark.parametrize("rule", ["singh", "lamb"])
def test_nothing_beyond_the_end_is_measured(engine, wide, rule):
    """Without betas and eps u is the sign of g; of zeros, as in the lanes after the last, 0/0."""
    params = engine.params(random([(3, 3)], seed=3), wide)
    opt = layerlr.Adam(params, lr=0.1, betas=(0.0, 0.0), eps=0.0, rule=rule, backend=engine.backend)
    cases.train(opt, params, 1)
    stats = opt.layer_stats()
    assert stats["skipped"].item() == 0 and stats["uu"].item() == pytest.approx(9.0, rel=1e-6)


def test_shape_of_the_answer(engine):
    params = engine.params(random(((4, 3), (3,), (2, 2), (5,), (2, 3)), seed=3), torch.float32)
    names = ["z", "a", "m", "k", "b"]
    named = list(zip(names, params))
    groups = [
        {"params": named[:2]},
        {"params": named[2:3], "rule": None},
        {"params": named[3:4], "rule": None, "on_nonfinite": "skip"},
    ]
    opt = layerlr.SGD(groups, lr=0.1, rule="singh", backend=engine.backend)
    stats = opt.layer_stats()
    assert list(stats) == KEYS
    assert stats["names"] == ["z", "a", "k"]  # in parameter order; "m" is not measured
    for key in KEYS[1:]:
        assert stats[key].dtype == (torch.int64 if key == "skipped" else torch.float64)
        assert stats[key].shape == (3,) and stats[key].device == params[0].device
        assert not stats[key].any()  # nothing has happened
    cases.train(opt, params, 1)
    first = opt.layer_stats()
    kept = {key: first[key].clone() for key in KEYS[1:]}
    assert first["ww"].all()
    opt.add_param_group({"params": named[4:]})
    cases.train(opt, params, 1, seed=3)
    assert all(torch.equal(first[key], kept[key]) for key in kept)  # copies
    assert opt.layer_stats()["names"] == ["z", "a", "k", "b"]
    assert not torch.equal(opt.layer_stats()["gg"][:3], kept["gg"])


def test_layers_that_do_not_take_part_keep_their_row(engine):
    params = engine.params(random(((4, 3), (3, 2)), seed=3))
    opt = layerlr.SGD(params, lr=0.1, rule="layca", backend=engine.backend)
    cases.train(opt, params, 1)
    before = opt.layer_stats()
    set_grads(params, 5)
    params[0].grad = None
    opt.step()
    after = opt.layer_stats()
    for key in KEYS[1:8]:
        assert after[key][0] == before[key][0]
    assert after["gg"][1] != before["gg"][1]


def test_without_a_rule_there_is_nothing(engine):
    params = engine.params(random(((4, 3),)))
    opt = layerlr.SGD(params, backend=engine.backend)
    cases.train(opt, params, 1)
    stats = opt.layer_stats()
    assert list(stats) == KEYS and stats["names"] == []
    assert all(stats[key].numel() == 0 for key in KEYS[1:])


def test_describe(engine, capsys):
    params = engine.params(random(((4, 3), (4,), (6, 2), (2,)), seed=3), torch.float32)
    named = list(zip(("a.weight", "a.bias", "qkv.weight", "head.bias"), params))
    groups = [
        {"params": named[:2], "layers": "module"},
        {"params": named[2:3], "split": [2, 4], "lr_factor": [0.5, 2.0]},
        {"params": named[3:], "rule": None, "weight_decay": 0},
    ]
    options = {"plain_lr": 0.02, "weight_decay": 0.1, "backend": engine.backend}
    opt = layerlr.AdamW(groups, lr=0.01, rule=Lamb(clip=10.0), **options)
    text = layerlr.describe(opt)
    assert capsys.readouterr().out == text + "\n"
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    rule, backend = repr(Lamb(clip=10.0)), engine.backend
    assert cells == [
        ["parameter", "shape", "layer", "rule", "role", "lr", "decay", "backend"],
        ["a.weight", "(4, 3)", "a", rule, "adapted", "0.01", "0.1", backend],
        ["a.bias", "(4,)", "-", "-", "plain", "0.02", "0.1", backend],
        ["qkv.weight", "(6, 2)", "qkv.weight[0]", rule, "adapted", "0.005", "0.1", backend],
        ["qkv.weight", "(6, 2)", "qkv.weight[1]", rule, "adapted", "0.02", "0.1", backend],
        ["head.bias", "(2,)", "-", "-", "plain", "0.02", "0", backend],
    ]


def test_describe_names_what_was_skipped(engine):
    params = engine.params(random(((4, 3), (4,)), seed=3), torch.float32)
    opt = layerlr.SGD(list(zip("wb", params)), rule="layca", backend=engine.backend)
    set_grads(params, 0)
    opt.step()
    assert "skipped" not in layerlr.describe(opt)
    for _ in range(3):
        params[0].grad[0, 0] = torch.nan
        opt.step()
    last = layerlr.describe(opt).splitlines()[-1]
    assert last == "skipped for a non-finite gradient: w (3)"


def test_describe_frozen_and_unnamed(engine):
    params = engine.params(random(((4, 3), (4,)), seed=3))
    opt = engine.make(BY_ID["mom-layca-frozen"], params)
    lines = layerlr.describe(opt).splitlines()
    assert lines[1].split()[0] == "group0.param0" and "adapted" in lines[1]
    assert lines[2].split() == ["group0.param1", "(4,)", "-", "-", "frozen", "0", "0", "-"]


def test_auto_takes_the_first_backend_that_can():
    from layerlr.backends import BACKENDS

    opt = layerlr.SGD([torch.ones(2, requires_grad=True)], rule="singh")
    table = layerlr.describe(opt)
    able = [n for n in BACKENDS if n not in ("cuda", "triton")]
    assert table.splitlines()[1].split()[-1] == able[0]
