"""What is done to the groups of a wrapper, or of its base, while they train."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import random, set_grads
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import layerlr


def weights():
    return [Parameter(v) for v in random(((6, 5), (5, 4)))]


def wrapped(rule="hyperball", lr=0.1, groups=1):
    params = weights()
    split = [params] if groups == 1 else [params[:1], params[1:]]
    base = torch.optim.SGD([{"params": ps} for ps in split], lr=0.1, momentum=0.9)
    set_grads(params, 0)
    return params, base, layerlr.wrap(base, rule, lr=lr)


@pytest.mark.parametrize("rule", ["brake", "singh", "lars"])
@pytest.mark.parametrize("lr", [None, 0.1])
@pytest.mark.parametrize("of_group", [{}, {"rule": None}])
def test_a_group_that_comes_later_has_its_lr(rule, lr, of_group):
    _, base, opt = wrapped(rule, lr)
    late = Parameter(torch.eye(3))
    opt.add_param_group({"params": [late], "lr": 0.001, **of_group})
    assert opt.param_groups[1]["lr"] == base.param_groups[1]["lr"] == 0.001
    late.grad = torch.ones_like(late)
    opt.step()
    assert base.param_groups[1]["lr"] == 0.001
    if of_group:
        torch.testing.assert_close(late.detach(), torch.eye(3) - 0.001)


@pytest.mark.parametrize("rule", ["brake", "layca"])
@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_of_the_base_is_spoken_of_once(rule, before):
    params = weights()
    base = torch.optim.SGD(params, lr=0.1)
    schedulers = [CosineAnnealingLR(base, 10)] if before else []
    opt = layerlr.wrap(base, rule, lr=0.1)
    schedulers += [] if before else [CosineAnnealingLR(base, 10)]
    set_grads(params, 0)
    with pytest.warns(UserWarning, match="a scheduler was made for the base of a wrapper"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_a_scheduler_of_the_wrapper_is_right():
    _, _, opt = wrapped()
    scheduler = CosineAnnealingLR(opt, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight_decay", 0.9), ("maximize", True), ("momentum", 0.5), ("max_grad_norm", 1.0)],
)
def test_numbers_of_the_base_are_refused(key, value):
    params, _, opt = wrapped(groups=2)
    opt.param_groups[1][key] = value
    before = [p.clone() for p in params]
    words = rf"has no effect on a wrapper.*optimizer.base.param_groups\[1\]\['{key}'\]"
    with pytest.raises(ValueError, match=words):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("change", ["more", "fewer", "turned"])
def test_other_parameters_than_the_base_has(change):
    _, _, opt = wrapped(groups=2)
    if change == "more":
        opt.param_groups[1]["params"].append(Parameter(torch.eye(3)))
    elif change == "fewer":
        del opt.param_groups[1]["params"][0]
    else:
        opt.param_groups.reverse()
    with pytest.raises(RuntimeError, match=r"param group . of a wrapper has other parameters than"):
        opt.step()


def test_keys_that_schedulers_and_programs_leave_on_both():
    """OneCycleLR has some; a label, or a number that the base has too, says nothing."""
    params = weights()
    base = torch.optim.AdamW(params, lr=0.1)
    opt = layerlr.wrap(base, "hyperball", lr=0.1)
    for optimizer in (base, opt):
        OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=False)
        optimizer.param_groups[0] |= {"name": "all", "betas": (0.9, 0.999)}
    set_grads(params, 0)
    with pytest.warns(UserWarning, match="a scheduler was made for the base"):
        opt.step()


def test_parameters_in_a_tuple():
    _, base, opt = wrapped()
    base.param_groups[0]["params"] = tuple(base.param_groups[0]["params"])
    opt.step()


def test_a_base_that_gives_no_state_dict_yet():
    """ZeRO's wants to be gathered first."""

    class Gathered(torch.optim.SGD):
        def state_dict(self):
            raise RuntimeError("not been consolidated")

    params = weights()
    opt = layerlr.wrap(Gathered(params, lr=0.1), "hyperball", lr=0.1)
    before = params[0].clone()
    set_grads(params, 0)
    opt.step()
    assert not torch.equal(before, params[0])


def test_rates_of_a_group_without_layers():
    base = torch.optim.SGD([{"params": weights(), "rule": None, "lr_factor": [2.0]}], lr=0.1)
    opt = layerlr.wrap(base, "hyperball", lr=0.1)
    assert opt.layer_stats()["names"] == []


def test_both_lists_may_change():
    _, base, opt = wrapped()
    late = Parameter(torch.eye(3))
    late.grad = torch.ones(3, 3)
    for groups in (opt.param_groups, base.param_groups):
        groups[0]["params"].append(late)
    opt.step()
    assert not torch.equal(late, torch.eye(3))


class Around(torch.optim.SGD):
    """Like Lookahead: an optimizer's state dict inside its own."""

    def state_dict(self):
        return {"inside": super().state_dict()}


def test_a_base_with_state_dicts_of_another_form():
    with pytest.raises(TypeError, match="state dicts of Around have a form of their own"):
        layerlr.wrap(Around(weights(), lr=0.1), "layca", lr=0.1)


class Prepared:
    """As Accelerate's and Lightning's have the optimizer that they were given."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


def test_optimizers_in_wrappers_of_others(capsys):
    inside = layerlr.SGD(weights(), lr=0.1, rule="layca")
    outside = Prepared(inside)
    assert layerlr.describe(outside) == layerlr.describe(inside)
    layerlr.monitor.StatsLog(outside).record()
    with pytest.raises(TypeError, match="Prepared has an optimizer of layerlr inside"):
        layerlr.wrap(outside, "lamb", lr=0.1)
    capsys.readouterr()


@pytest.mark.parametrize("rule", ["layca", None])
def test_refresh_of_groups_without_a_rule(rule):
    """Nothing of a wrapper is captured; groups that the rule leaves alone have no plans at all."""
    params = weights()
    base = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "rule": None}], lr=0.1)
    opt = layerlr.wrap(base, rule, lr=0.1)
    set_grads(params, 0)
    opt.step()
    opt.refresh()
    assert params[1] not in opt.state
