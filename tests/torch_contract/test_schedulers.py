"""What may change between two steps: rates, hyper-parameters, weights and state."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from cases import bits, set_grads, train
from contract_helpers import (
    assert_close,
    each_backend,
    each_rule,
    each_variant,
    make,
    make_twin,
    named,
    one_backend,
    photograph,
    same,
    weights,
)
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import layerlr

SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 3, 7], 0.5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, 0.2, total_steps=13, cycle_momentum=_cycles(o)
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.2, 2, cycle_momentum=_cycles(o)),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.95**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 1 - t / 20),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2, total_iters=6),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, total_iters=4),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 9, 2.0),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.8)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=3), schedulers.StepLR(o, 2, 0.7)]
    ),
    "SWALR": lambda o: SWALR(o, 0.002, anneal_epochs=5),
}
each_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def _cycles(opt):
    return "momentum" in opt.defaults or "betas" in opt.defaults


def drive(opt, params, scheduler, steps=12):
    """Train under a scheduler; the rates, momenta and betas that the steps saw."""
    seen = []
    driver = SCHEDULERS[scheduler](opt)
    for step in range(steps):
        set_grads(params, step)
        opt.step()
        seen.append([float(opt.param_groups[0]["lr"])])
        for key in ("momentum", "betas"):
            seen[-1] += [opt.param_groups[0].get(key)]
        # a metric that falls at first and rises later
        driver.step(abs(step - 3)) if scheduler == "ReduceLROnPlateau" else driver.step()
    return seen


def test_every_scheduler_of_torch_is_here():
    found = {
        name
        for name, cls in vars(schedulers).items()
        if isinstance(cls, type) and issubclass(cls, schedulers.LRScheduler) and name[0] != "_"
    }
    assert found - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@each_variant
@each_scheduler
@one_backend
def test_schedulers_drive_ours_and_the_twin_alike(variant, scheduler, backend):
    ours, theirs = weights(), weights()
    seen = drive(make(variant, ours, backend=backend), ours, scheduler)
    wanted = drive(make_twin(variant, theirs), theirs, scheduler)
    assert seen == wanted
    assert len({s[0] for s in seen}) > 1
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("variant", "rule"),
    [("nesterov", "singh"), ("amom", "layca"), ("adagrad", "lars"), ("adamw", "lamb")],
)
@each_scheduler
@one_backend
def test_schedulers_with_a_rule(variant, rule, scheduler, backend):
    """As if the values that the scheduler chose had been written by hand."""
    ours, by_hand = weights(), weights()
    seen = drive(make(variant, ours, rule, backend=backend), ours, scheduler)
    opt = make(variant, by_hand, rule, backend=backend)
    for step, (lr, momentum, betas) in enumerate(seen):
        group = opt.param_groups[0]
        group["lr"] = lr
        group.update({"momentum": momentum} if momentum is not None else {})
        group.update({"betas": betas} if betas is not None else {})
        train(opt, by_hand, 1, seed=step)
    assert same(ours, by_hand)
    assert not any(same(bits(p), bits(q)) for p, q in zip(ours, weights(), strict=True))


@pytest.mark.parametrize(("variant", "rule"), [("momentum", "layca"), ("adam", None)])
@each_scheduler
@one_backend
def test_schedulers_fill_a_tensor_lr(variant, rule, scheduler, backend):
    lr = torch.tensor(0.1, dtype=torch.float64)
    ours, theirs = weights(), weights()
    opt = make(variant, ours, rule, backend=backend, lr=lr)
    seen = drive(opt, ours, scheduler)
    if scheduler not in ("OneCycleLR", "CyclicLR", "SWALR"):  # these may put a float in its place
        assert opt.param_groups[0]["lr"] is lr
    opt = make(variant, theirs, rule, backend=backend)
    for step, (rate, momentum, betas) in enumerate(seen):
        opt.param_groups[0].update({"lr": rate})
        opt.param_groups[0].update({"momentum": momentum} if betas is None else {"betas": betas})
        train(opt, theirs, 1, seed=step)
    assert same(ours, theirs)


CHANGES = {
    "momentum on": ("sgd", {}, {"momentum": 0.9}),
    "momentum on, dampened": ("sgd", {"dampening": 0.3}, {"momentum": 0.9}),
    "momentum off": ("momentum", {}, {"momentum": 0}),
    "dampening": ("momentum", {}, {"dampening": 0.5}),
    "nesterov": ("momentum", {}, {"nesterov": True}),
    "betas": ("adam", {}, {"betas": (0.5, 0.6)}),
    "tensor betas": ("adam", {}, {"betas": torch.tensor([0.5, 0.6], dtype=torch.float64).unbind()}),
    "eps": ("adamw", {}, {"eps": 0.1}),
    "alpha": ("rmsprop", {}, {"alpha": 0.5}),
    "lr_decay": ("adagrad", {}, {"lr_decay": 0.5}),
    "averaged": ("amom", {}, {"momentum": 0.5}),
    "lr": ("momentum", {}, {"lr": 0.01}),
    "lr becomes a tensor": ("momentum", {}, {"lr": torch.tensor(0.25)}),
    "weight decay": ("adam", {}, {"weight_decay": 0.3}),
    "decoupled decay": ("adamw", {}, {"weight_decay": 0}),
    "maximize": ("rmsprop", {}, {"maximize": True}),
}


@pytest.mark.parametrize("change", CHANGES)
@each_backend
def test_a_changed_group_counts_from_the_next_step(change, backend):
    variant, arguments, new = CHANGES[change]
    runs = []
    for build, options in ((make, {"backend": backend}), (make_twin, {})):
        params = weights()
        opt = build(variant, params, **arguments, **options)
        train(opt, params, 3)
        old = {k: opt.param_groups[0][k] for k in new}
        opt.param_groups[0].update(new)
        train(opt, params, 3, seed=3)
        opt.param_groups[0].update(old)
        train(opt, params, 3, seed=6)
        runs.append(params)
    assert_close(*runs)
    untouched = weights()
    train(make(variant, untouched, **arguments), untouched, 9)
    assert not torch.allclose(untouched[0], runs[0][0], rtol=1e-6)


@each_variant
@each_backend
def test_a_changed_rule_counts_from_the_next_step(variant, backend):
    params, oracle = weights(), weights()
    opt = make(variant, params, "layca", backend=backend)
    train(opt, params, 2)
    state = deepcopy(opt.state_dict()["state"])
    opt.param_groups[0]["rule"] = "lamb"
    saved = opt.state_dict()["param_groups"][0]["rule"]
    assert saved == layerlr.rules.Lamb().to_dict()
    train(opt, params, 2, seed=2)
    train(make(variant, oracle, "layca", backend=backend), oracle, 2)
    fresh = make(variant, oracle, "lamb", backend=backend)
    fresh.load_state_dict(fresh.state_dict() | {"state": state})
    train(fresh, oracle, 2, seed=2)
    assert same(params, oracle)


# -- which parameters take part ------------------------------------------------------------------


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("frozen_at_first", [False, True])
def test_late_and_thawed_parameters_start_afresh(variant, rule, backend, frozen_at_first):
    """Each tensor is a layer here, so it must go the way it would go alone."""
    params, alone = weights(), weights()
    for p in params[:2]:
        p.requires_grad_(not frozen_at_first)
    opt = make(variant, params, rule, backend=backend)
    singles = [make(variant, [p], rule, backend=backend) for p in alone]
    for step in range(5):
        set_grads(alone, step)
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            # the first two take part from the third step on, the last one misses a step
            takes_part = step >= 2 if i < 2 else (i, step) != (3, 3)
            p.grad = None
            if takes_part:
                p.requires_grad_(True)
                p.grad = q.grad.clone()
                singles[i].step()
        opt.step()
    assert same(params, alone)
    for p, q, single in zip(params, alone, singles, strict=True):
        assert same(opt.state[p], single.state[q])


@each_variant
@each_rule
@each_backend
def test_a_frozen_parameter_with_a_gradient_steps_as_in_torch(variant, rule, backend):
    runs = []
    for frozen in (True, False):
        params = weights()
        params[0].requires_grad_(not frozen)
        opt = make(variant, params, rule, backend=backend)
        train(opt, params, 2)
        runs.append(params)
    assert same(*runs)


@each_rule
@each_backend
def test_looking_at_the_state_of_a_frozen_parameter_makes_none(rule, backend):
    params = weights()
    params[0].requires_grad_(False)
    opt = make("adam", params, rule, backend=backend)
    assert opt.state[params[0]] == {}  # the defaultdict has an entry from now on
    kept = bits(params[0])
    train(opt, params[1:], 2)
    assert same(bits(params[0]), kept)
    assert [opt.state[p].get("step") for p in params] == [None, 2, 2, 2]


@each_variant
@each_rule
@one_backend
def test_groups_edited_by_hand(variant, rule, backend):
    """Libraries write into param_groups; each tensor is a layer here, so it goes its own way."""
    params, alone = weights(), weights()
    opt = make(variant, params[:3], rule, backend=backend)
    singles = [make(variant, [p], rule, backend=backend) for p in alone]
    train(opt, params, 2)
    del opt.param_groups[0]["params"][0]
    opt.param_groups[0]["params"].append(params[3])
    train(opt, params, 2, seed=2)
    kept = opt.param_groups[0]
    opt.param_groups.clear()
    opt.add_param_group({**kept, "params": params[1:2]})
    opt.param_groups.append({**kept, "params": params[2:3]})
    opt.param_groups.append({**kept, "params": params[3:]})
    train(opt, params, 2, seed=4)
    spans = (0, 2), (0, 6), (0, 6), (2, 6)
    for single, span in zip(singles, spans, strict=True):
        for step in range(*span):
            set_grads(alone, step)
            single.step()
    assert same(params, alone)


@each_variant
@each_rule
@each_backend
def test_scalars_and_empty_parameters(variant, rule, backend):
    shapes = ((), (0,), (3, 0), (1,), (2, 3), (1, 1, 1))
    params, alone = weights(shapes=shapes), weights(shapes=shapes)
    opt = make(variant, params, rule, backend=backend)
    train(opt, params, 3)
    for i, p in enumerate(alone):
        single = make(variant, [p], rule, backend=backend)
        for step in range(3):
            set_grads(alone, step)
            single.step()
        assert same(p, params[i])
        assert opt.state[params[i]]["step"] == 3
    if rule is None:
        theirs = weights(shapes=shapes)
        train(make_twin(variant, theirs), theirs, 3)
        assert_close(params, theirs)


# -- weights and state change ----------------------------------------------------------------------


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_change_its_dtype_before_the_first_step(variant, rule, backend, dtype):
    runs = []
    for early in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        model = model.to(dtype) if early else model
        opt = make(variant, model.parameters(), rule, backend=backend)
        model.to(dtype)
        train(opt, list(model.parameters()), 4)
        runs.append(photograph(opt))
    assert same(*runs)


@each_variant
@each_rule
@each_backend
def test_replaced_data_is_what_the_next_step_moves(variant, rule, backend):
    runs = []
    for how in ("copied", "replaced", "other strides"):
        params = weights()
        opt = make(variant, params, rule, backend=backend)
        train(opt, params, 2)
        for p in params:
            new = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)
            if how == "copied":
                p.data.copy_(new)
            elif how == "replaced":
                p.data = new
            else:
                p.data = torch.stack([new, new], -1)[..., 0]
        train(opt, params, 2, seed=2)
        runs.append((params, photograph(opt)))
    assert same(runs[0][1], runs[1][1])
    assert_close(runs[0][0], runs[2][0])


@each_variant
@each_rule
@each_backend
def test_replaced_state_is_what_the_next_step_uses(variant, rule, backend):
    runs = []
    for how in ("in place", "entry", "data", "dict"):
        params = weights()
        opt = make(variant, params, rule, backend=backend)
        train(opt, params, 2)
        for p in params[1:]:
            for key, value in list(opt.state[p].items()):
                if how == "in place":
                    value += 1
                elif how == "entry":
                    opt.state[p][key] = value + 1
                elif how == "data":
                    value.data = value + 1
            if how == "dict":
                opt.state[p] = {k: v + 1 for k, v in opt.state[p].items()}
        train(opt, params, 2, seed=2)
        runs.append(photograph(opt))
    assert all(same(run, runs[0]) for run in runs)


@each_rule
def test_state_data_of_another_form_is_noticed(rule):
    """The tensor object stays, so only a look at its dtype and shape can tell."""
    runs = []
    for backend in ("auto", "reference"):
        params = weights(torch.float32)
        opt = make("adam", named(params), rule, backend=backend)
        train(opt, params, 1)
        value = opt.state[params[0]]["exp_avg"]
        value.data = value.bfloat16()
        opt.state[params[2]]["step"].data = torch.tensor(5.0, dtype=torch.float64)
        train(opt, params, 2, seed=1)
        runs.append(photograph(opt))
        value = opt.state[params[0]]["exp_avg"]
        assert value.dtype == torch.float32
        value.data = torch.zeros(2)
        with pytest.raises(RuntimeError, match=r"'layer0.weight'"):
            opt.step()
        assert same(photograph(opt)["weights"], runs[-1]["weights"])
    assert same(*runs) if rule is None else same(*(r["state"][1] for r in runs))


@each_variant
@each_rule
@each_backend
@pytest.mark.parametrize("how", ["state", "dict", "dict in place"])
def test_cleared_state_starts_afresh(variant, rule, backend, how):
    params = weights()
    opt = make(variant, params, rule, backend=backend)
    train(opt, params, 2)
    fresh = [Parameter(p.detach().clone()) for p in params]
    if how == "state":
        opt.state.clear()
    for p in params:
        if how == "dict":
            opt.state[p] = {}
        elif how == "dict in place":
            opt.state[p].clear()
    train(opt, params, 2, seed=2)
    other = make(variant, fresh, rule, backend=backend)
    train(other, fresh, 2, seed=2)
    assert same(photograph(opt), photograph(other))


@pytest.mark.parametrize("how", ["deleted", "None"])
@pytest.mark.parametrize("variant", ["momentum", "dampened", "nesterov"])
@each_backend
def test_a_lost_momentum_buffer_is_made_anew_as_in_torch(variant, how, backend):
    runs = []
    for build, options in ((make, {"backend": backend}), (make_twin, {})):
        params = weights()
        opt = build(variant, params, **options)
        train(opt, params, 2)
        for p in params:
            opt.state[p]["momentum_buffer"] = None
            if how == "deleted":
                del opt.state[p]["momentum_buffer"]
        train(opt, params, 2, seed=2)
        runs.append(params)
    assert_close(*runs)
