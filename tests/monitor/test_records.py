"""Records that come late, are read early, are none; runs that share a file."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import random, set_grads
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr.monitor import AngularRates, LayerRotation, StatsLog, Trace, replay


def logged(n=1):
    params = [Parameter(v) for v in random(((4, 3),) * n)]
    opt = layerlr.SGD(params, lr=0.1, rule="lars")
    return params, opt, StatsLog(opt)


def step(params, opt, log):
    set_grads(params, 0)
    opt.step()
    log.record()


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("records", [1, 300])
def test_layers_that_come_late_lose_nothing(records, read):
    params, opt, log = logged()
    for _ in range(records):
        step(params, opt, log)
    before = log.curves("ww").values.clone() if read else None
    step(params, opt, log)
    params.append(Parameter(torch.ones(2, 2)))
    opt.add_param_group({"params": params[1:]})
    step(params, opt, log)
    values = log.curves("ww").values
    assert values.shape == (records + 2, 2)
    assert values[:-1, 1].isnan().all() and not values[:, 0].isnan().any() and values[-1, 1] == 4
    assert before is None or torch.equal(values[:records, :1], before)


@pytest.mark.parametrize(
    "read",
    [StatsLog.state_dict, StatsLog.curves, copy.deepcopy, pickle.dumps],
    ids=["state_dict", "curves", "deepcopy", "pickle"],
)
def test_what_is_read_before_the_first_record_goes_on(read):
    params, opt, log = logged()
    read(log)
    for _ in range(2):
        step(params, opt, log)
    assert log.curves().values.shape == (2, 1)


@pytest.mark.parametrize("number", ["x", [1, 2], None])
def test_a_step_that_is_no_number_changes_nothing(number):
    model = nn.Linear(4, 4)
    log = LayerRotation(model, angles=True)
    model.weight.data.add_(torch.eye(4))
    if number is not None:
        with pytest.raises(ValueError, match=r"Invalid step: .*, wanted None or a number"):
            log.record(number)
    log.record()
    assert log.curves().angles[-1].item() > 0.01


def test_statistics_are_of_our_optimizers():
    with pytest.raises(TypeError, match="wanted an optimizer of layerlr, with layer_stats"):
        StatsLog(torch.optim.SGD([Parameter(torch.ones(2))]))


# -- traces ----------------------------------------------------------------------------------------


def record(path, lr, steps, begin=0):
    params = [Parameter(v) for v in random(((4, 3), (3, 3)))]
    opt = layerlr.SGD([("a", params[0]), ("b", params[1])], lr=lr, rule="layca")
    with AngularRates(opt, path) as rates:
        rates.load_state_dict({"step": begin})
        for _ in range(steps):
            set_grads(params, 0)
            opt.step()


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        ((0.01, 3), {1: 0.01, 2: 0.01, 3: 0.01}),
        ((0.01, 2, 3), {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.01, 5: 0.01}),
        ((0.01, 1, 5), {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.1, 6: 0.01}),
    ],
    ids=["another", "resumed", "on"],
)
def test_runs_that_share_a_file(tmp_path, second, wanted):
    record(tmp_path / "run.jsonl", 0.1, 5)
    record(tmp_path / "run.jsonl", *second)
    trace = Trace.load(tmp_path / "run.jsonl")
    found = dict(zip(trace.steps, trace.angles, strict=True))
    assert {k: round(math.tan(v["b"]), 5) for k, v in found.items()} == wanted
    assert all(set(v) == {"a", "b"} for v in found.values())


def test_runs_of_one_step_that_share_a_file(tmp_path):
    for lr in (0.1, 0.01):
        record(tmp_path / "run.jsonl", lr, 1)
    (angles,) = Trace.load(tmp_path / "run.jsonl").angles
    assert math.tan(angles["a"]) == pytest.approx(0.01)


@pytest.mark.parametrize("line", ['{"step": 1, "lay', "", "3"])
def test_lines_that_are_no_records(tmp_path, line):
    file = tmp_path / "run.jsonl"
    record(file, 0.1, 1)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 3 (is no JSON|has no step)"):
        Trace.load(file)


def test_layers_of_one_name_turn_as_each_did():
    models = [nn.Linear(4, 4, bias=False) for _ in range(2)]
    rates = [0.1, 0.01]
    named = [list(model.named_parameters()) for model in models]
    groups = [{"params": p, "lr": lr} for p, lr in zip(named, rates, strict=True)]
    trace = Trace()
    opt = layerlr.SGD(groups, lr=0.1, rule="layca")
    with AngularRates(opt, trace):
        set_grads([model.weight for model in models], 0)
        opt.step()
    other = layerlr.SGD([{"params": p} for p in named], lr=0.5, rule="layca")
    replay(trace, other)
    assert [group["lr"] for group in other.param_groups] == pytest.approx(rates)


def test_a_replay_that_is_refused_changes_nothing():
    trace = Trace()
    trace(1, {"names": ["a", "b"], "angle": torch.tensor([0.1, 0.2])})
    a, b, c = (Parameter(v) for v in random(((3, 3),) * 3))
    opt = layerlr.SGD([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)]}], 0.5, rule="layca")
    with pytest.raises(ValueError, match="the trace does not know layer 'c'"):
        replay(trace, opt)
    assert [(g["lr"], g.get("lr_factor")) for g in opt.param_groups] == [(0.5, None)] * 2


@pytest.mark.parametrize("rule", ["hyperball", {"name": "layca"}])
def test_a_rule_that_was_set_by_name(rule):
    params = [Parameter(v) for v in random(((4, 3),))]
    opt = layerlr.SGD([("a", params[0])], lr=0.1, rule="layca")
    rates = AngularRates(opt)
    opt.param_groups[0]["rule"] = rule
    set_grads(params, 0)
    opt.step()
    assert rates.rates()["angle"].item() > 0.05
    opt.param_groups[0]["rule"] = rule
    trace = Trace()
    trace(1, {"names": ["a"], "angle": torch.tensor([0.2])})
    replay(trace, opt)
    assert opt.param_groups[0]["lr"] == pytest.approx(math.tan(0.2))
