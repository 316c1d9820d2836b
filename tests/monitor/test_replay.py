"""`monitor.replay`: the angles of one run as the schedule of another."""

from __future__ import annotations

import io
import math
import warnings

import pytest
import torch
from cases import set_grads
from torch import nn

import layerlr
from layerlr import rules
from layerlr.monitor import AngularRates, Trace, replay


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def train(model, opt, steps, scheduler=None, first=0):
    angles = []
    with AngularRates(opt, lambda step, table: angles.append(table)):
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(32, n, generator=generator) for n in (6, 3))
            opt.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()
            if scheduler is not None:
                scheduler.step()
    return angles


@pytest.fixture(scope="module")
def trace():
    model, found = mlp(), Trace()
    opt = torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1)
    with AngularRates(opt, found):
        train(model, opt, 20)
    return found


def under(kind, model, **kwargs):
    params = model.named_parameters()
    if kind == "wrapped":
        return layerlr.wrap(torch.optim.Adam(params, lr=0.01), "layca", lr=0.1, **kwargs)
    return layerlr.SGD(params, lr=0.1, momentum=0.9, rule=kind, plain_lr=0.01, **kwargs)


@pytest.mark.parametrize("kind", ["layca", "wrapped"])
def test_each_layer_turns_as_it_did(trace, kind):
    model = mlp()
    opt = under(kind, model)
    found = train(model, opt, 20, replay(trace, opt))
    for table, wanted in zip(found, trace.angles, strict=True):
        angles = dict(zip(table["names"], table["angle"].tolist(), strict=True))
        for name, angle in wanted.items():
            assert angles[name] == pytest.approx(angle, abs=1e-6)
    assert min(trace.angles[-1].values()) > 1e-3


def test_the_mean_leaves_the_plan_alone(trace):
    model = mlp()
    opt = under("layca", model)
    scheduler, plans = replay(trace, opt, per_layer=False), opt.plans.groups[0]
    found = train(model, opt, 20, scheduler)
    for table, wanted in zip(found, trace.angles, strict=True):
        angles = dict(zip(table["names"], table["angle"].tolist(), strict=True))
        mean = sum(wanted.values()) / len(wanted)
        assert [angles[n] for n in wanted] == pytest.approx([mean] * len(wanted), abs=1e-6)
    assert opt.plans.groups[0] is plans and "lr_factor" not in opt.param_groups[0]


def test_hyperball_turns_as_far_where_its_step_is_orthogonal(trace):
    model = mlp()
    opt = under("hyperball", model)
    replay(trace, opt)
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    before = {n: w.detach().double().clone() for n, w in weights.items()}
    set_grads(list(model.parameters()), 0)
    for w in weights.values():
        w.grad -= (w.grad * w).sum() / (w * w).sum() * w.detach()
    opt.step()
    for name, w in weights.items():
        chord = (w.double() / w.double().norm() - before[name] / before[name].norm()).norm()
        angle = 2 * math.asin(float(chord.detach()) / 2)
        assert angle == pytest.approx(trace.angles[0][name], abs=1e-6)


def test_resumes(trace):
    model = mlp()
    opt = under("layca", model)
    scheduler = replay(trace, opt)
    train(model, opt, 5, scheduler)
    file = io.BytesIO()
    saved = {"opt": opt.state_dict(), "schedule": scheduler.state_dict(), "m": model.state_dict()}
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = mlp()
    other.load_state_dict(saved["m"])
    other_opt = under("layca", other)
    other_schedule = replay(trace, other_opt)
    other_schedule.load_state_dict(saved["schedule"])
    other_opt.load_state_dict(saved["opt"])
    train(model, opt, 5, scheduler, first=5)
    train(other, other_opt, 5, other_schedule, first=5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_steps_between_records_take_the_next(tmp_path):
    path = tmp_path / "angles.jsonl"
    model = mlp()
    opt = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with AngularRates(opt, path, every=5):
        train(model, opt, 10)
    model = mlp()
    opt = under("layca", model)
    scheduler = replay(path, opt, per_layer=False)
    lrs = []
    for _ in range(12):
        lrs.append(opt.param_groups[0]["lr"])
        train(model, opt, 1, scheduler)
    assert len(set(lrs[:5])) == len(set(lrs[5:])) == 1 and lrs[0] != lrs[5]


def recorded(**angles):
    found = Trace()
    found(1, {"names": list(angles), "angle": torch.tensor(list(angles.values()))})
    return found


def test_refusals(trace, tmp_path):
    model = mlp()
    with pytest.raises(TypeError, match=r"layerlr\.wrap"):
        replay(trace, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no angle under Lamb"):
        replay(trace, under("lamb", model))
    with pytest.raises(ValueError, match="no angle under Layca"):
        replay(trace, under(rules.Layca(max_angle=0.1), model))
    with pytest.raises(ValueError, match=r"does not know layer 'group0\.param0'"):
        replay(trace, layerlr.SGD(model.parameters(), lr=0.1, rule="layca"))
    with pytest.raises(ValueError, match="no record"):
        replay(Trace(), under("layca", model))
    one = nn.Sequential()
    one.add_module("a", nn.Linear(3, 3, bias=False))
    for angle in (2.0, math.nan):
        with pytest.raises(ValueError, match=r"layer 'a.weight' turned by"):
            replay(recorded(**{"a.weight": angle}), under("layca", one))
    bad = recorded(a=0.1)
    with pytest.raises(ValueError, match="step 1 comes after step 1"):
        bad(1, {"names": [], "angle": torch.zeros(0)})
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1, "layer": "a"}\n')
    with pytest.raises(ValueError, match="line 1 has no step"):
        Trace.load(path)


@pytest.mark.parametrize("options", [{}, {"rule": "layca", "adapt": "none"}])
def test_an_optimizer_that_turns_nothing(trace, options):
    """Its rule was forgotten: a scheduler without effect."""
    with pytest.raises(ValueError, match="replay turns no layer: give rule='layca' or"):
        replay(trace, layerlr.SGD(mlp().named_parameters(), lr=0.1, **options))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": "3", "layer": "a", "angle": 0.1}', "line 1: step is no int, or layer no name"),
        ('{"step": 3, "layer": ["a"], "angle": 0.1}', "line 1: step is no int, or layer no name"),
        ('{"step": 3, "layer": "a", "angle": "x"}', "line 1: angle 'x' is no number"),
    ],
)
def test_files_of_something_else(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=words):
        Trace.load(path)


@pytest.mark.parametrize("there", [False, True])
def test_a_frozen_layer_is_left_out(trace, there):
    """`AngularRates` has no record of it, `Telemetry` one of 0: of the mean it is no part."""
    model = mlp()
    weight = model[2].weight.requires_grad_(False)
    without = Trace()
    for step, angles in zip(trace.steps, trace.angles, strict=True):
        others = {name: x for name, x in angles.items() if name != "2.weight"}
        without._append(step, (others | ({"2.weight": 0.0} if there else {})).items())
    opt = under("layca", model)
    scheduler = replay(without, opt)
    first = [without.angles[0][name] for name in ("0.weight", "4.weight")]
    assert opt.param_groups[0]["lr"] == pytest.approx(math.tan(sum(first) / 2))
    before = weight.clone()
    found = train(model, opt, 3, scheduler)
    assert torch.equal(weight, before)
    for angles, table in zip(without.angles, found, strict=False):
        turned = dict(zip(table["names"], table["angle"].tolist(), strict=True))
        for name in ("0.weight", "4.weight"):
            assert turned[name] == pytest.approx(angles[name], rel=1e-3)


def test_groups_without_a_rule_keep_their_lr(trace):
    model = mlp()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 2]},
        {
            "params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1],
            "rule": None,
            "lr": 0.03,
        },
    ]
    opt = layerlr.SGD(groups, lr=0.1, rule="layca")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, 3, replay(trace, opt))
    assert opt.param_groups[1]["lr"] == 0.03
