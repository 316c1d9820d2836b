"""Group key ``precision``: random bits, state, and what must not change."""

from __future__ import annotations

import copy
import io
import math
import pickle

import cases
import numpy as np
import pytest
import torch
from cases import same_bits, same_state, set_grads, state_of, train
from half_weights import (
    BF16,
    DIRECTIONS,
    F32,
    KEYS,
    SHAPES,
    ULP,
    each_precision,
    halves,
    held,
    photograph,
)
from selection import NONE
from torch.nn import Parameter

import layerlr
from layerlr.rules import Lamb

# -- random bits -----------------------------------------------------------------------------------


def trained(engine, seed, process=0):
    torch.manual_seed(process)
    params = halves(engine)
    group = {"params": params, "seed": seed}
    opt = layerlr.SGD([group], 1e-3, backend=engine.backend, precision="stochastic")
    train(opt, params, 3)
    return params


def test_runs_are_reproducible(engine):
    assert same_bits(trained(engine, 1), trained(engine, 1))
    assert not same_bits(trained(engine, 1), trained(engine, 2))


@pytest.mark.parametrize("seed", [None, 5])
def test_processes_round_alike(engine, seed):
    """Each has a seed of torch's own: copies of a model must not part."""
    assert same_bits(trained(engine, seed, process=1), trained(engine, seed, process=2))


@pytest.mark.asked(triton=NONE, simt=NONE)
def test_the_seed_of_a_group(engine):
    one, two = halves(engine, seed=1), halves(engine, seed=1)
    groups = [{"params": one, "seed": 3}, {"params": two, "seed": np.int64(3)}]
    seeds = []
    for _ in range(2):
        opt = layerlr.SGD(groups, 1e-3, backend=engine.backend, precision="stochastic")
        seeds.append([int(s) for s in held(opt, [*one, *two], "rounding_seed")])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2 * len(SHAPES)
    train(opt, [*one, *two], 2)
    assert not same_bits(one[:1], two[:1])


@pytest.mark.asked(triton=NONE, simt=NONE)
def test_parameters_that_come_later_have_seeds_of_their_own(engine):
    params = halves(engine)
    params[1].requires_grad_(False)
    opt = layerlr.SGD(params[:3], backend=engine.backend, precision="stochastic", lr=0.1)
    assert params[1] not in opt.state
    opt.add_param_group({"params": params[3:]})
    params[1].requires_grad_(True)
    train(opt, params, 1)
    assert len({int(s) for s in held(opt, params, "rounding_seed")}) == len(params)
    with_all = layerlr.SGD(params, backend=engine.backend, precision="stochastic", lr=0.1)
    keys = [held(o, params, "rounding_seed") for o in (opt, with_all)]
    assert same_bits(*keys)


# -- state -----------------------------------------------------------------------------------------

WAYS = ["state dict", "weights_only", "deepcopy", "pickle"]


@pytest.mark.asked(triton=NONE, simt=NONE)
@pytest.mark.parametrize("way", WAYS)
@each_precision
def test_a_run_goes_on_to_the_bit(engine, way, precision):
    case = cases.Case("", *[DIRECTIONS["adamw"][0], Lamb(), DIRECTIONS["adamw"][1]])
    params = halves(engine)
    opt = engine.make(case, params, precision=precision)
    train(opt, params, 2)
    if way in ("deepcopy", "pickle"):
        pair = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
        other, again = pair[way]((opt, params))
    else:
        again = engine.params(params)
        saved = copy.deepcopy(opt.state_dict())
        if way == "weights_only":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        torch.manual_seed(123)
        other = engine.make(case, again, precision=precision)
        other.load_state_dict(saved)
    for p, q in zip(params, again):
        assert same_state(state_of(opt, p), state_of(other, q))
    for o, ps in ((opt, params), (other, again)):
        train(o, ps, 3, seed=2)
    assert same_bits(params, again)
    for p, q in zip(params, again):
        assert same_state(state_of(opt, p), state_of(other, q))


@pytest.mark.asked(triton=NONE, simt=NONE)
@each_precision
def test_state_is_there_from_the_beginning(engine, precision):
    params = [*halves(engine), *engine.params([torch.ones(3)], F32)]
    opt = layerlr.SGD(params, 0.1, backend=engine.backend, precision=precision)
    for p in params[:-1]:
        value = opt.state[p][KEYS[precision]]
        if precision == "stochastic":
            assert (value.dtype, value.shape, value.device.type) == (torch.int64, (), "cpu")
        else:
            assert value.dtype == (F32 if precision == "master" else BF16)
            assert (value.shape, value.stride(), value.device) == (p.shape, p.stride(), p.device)
            assert same_bits([value], [p.float() if precision == "master" else torch.zeros_like(p)])
    assert opt.state[params[-1]].keys() == {"step"}


@each_precision
def test_other_dtypes_step_as_without(engine, precision):
    dtypes = (F32, torch.float64, torch.complex64)
    sides = []
    for value in (None, precision):
        params = [Parameter(torch.ones(5, dtype=d, device=engine.device)) for d in dtypes]
        params += halves(engine)
        opt = layerlr.SGD(params, 0.1, momentum=0.9, backend=engine.backend, precision=value)
        train(opt, params, 2)
        sides.append((params[:3], [state_of(opt, p) for p in params[:3]]))
    assert same_bits(sides[0][0], sides[1][0])
    assert all(map(same_state, sides[0][1], sides[1][1]))


@pytest.mark.asked(triton=NONE, simt=NONE)
def test_a_group_of_its_own(engine):
    params = halves(engine)
    groups = [{"params": params[:3]}, {"params": params[3:], "precision": "kahan"}]
    opt = layerlr.SGD(groups, 0.1, backend=engine.backend)
    train(opt, params, 2)
    assert ["compensation" in opt.state[p] for p in params] == [False] * 3 + [True] * 3
    opt.param_groups[0]["precision"] = "master"
    train(opt, params, 1)
    assert ["master" in opt.state[p] for p in params] == [True] * 3 + [False] * 3
    assert same_bits(params[:3], [m.to(BF16) for m in held(opt, params[:3], "master")])


@pytest.mark.asked(triton=NONE, simt=NONE)
def test_no_key_no_state(engine):
    params = halves(engine)
    opt = layerlr.SGD(params, 0.1, backend=engine.backend)
    train(opt, params, 1)
    assert all(opt.state[p].keys() == {"step"} for p in params)


@pytest.mark.asked(triton=NONE, simt=NONE)
def test_state_dicts_without_the_key_load(engine):
    params = halves(engine)
    opt = layerlr.SGD(params, 0.1, backend=engine.backend, precision="master")
    theirs = torch.optim.SGD(params, 0.1)
    train(theirs, params, 1)
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["precision"] == "master"
    assert same_bits(held(opt, params, "master"), [p.float() for p in params])


@each_precision
@pytest.mark.parametrize("what", ["skipped", "no rate", "no gradient", "found_inf"])
def test_no_bit_changes(engine, precision, what):
    params = halves(engine)
    opt = layerlr.SGD(
        params, 0.01, rule="layca", backend=engine.backend, precision=precision, fused=True
    )
    train(opt, params, 3)
    ties = opt.state[params[5]]
    if precision == "kahan":  # the sum rounds to another number than p
        params[5].detach()[0] = 1.0
        ties["compensation"][0] = -(2**-9)
        params[5].detach()[1] = 1.0 + ULP
        ties["compensation"][1] = -ULP / 2
    set_grads(params, 9)
    if what == "skipped":
        for p in params:
            p.grad.fill_(math.nan)
    if what == "no rate":
        opt.param_groups[0]["lr"] = 0.0
    if what == "no gradient":
        for p in params:
            p.grad.zero_()
    if what == "found_inf":
        opt.found_inf, opt.grad_scale = (torch.ones((), device=engine.device) for _ in range(2))
    counts = [opt.state[p]["step"].clone() for p in params]
    before = photograph(opt, params)
    opt.step()
    for p, count in zip(params, counts):
        opt.state[p]["step"].copy_(count)
    assert same_bits(photograph(opt, params), before)


@pytest.mark.asked(triton=NONE, simt=NONE)
@pytest.mark.parametrize("way", ["load_state_dict", "data", "copy_", "swap"])
@pytest.mark.parametrize("precision", ["master", "kahan"])
def test_weights_that_are_written_count(engine, precision, way):
    model = torch.nn.Linear(8, 8, device=engine.device, dtype=BF16)
    params = list(model.parameters())
    opt = layerlr.SGD(params, 2**-9, backend=engine.backend, precision=precision)
    train(opt, params, 3)
    new = [torch.full_like(p, 3.0) for p in params]
    if way == "load_state_dict":
        model.load_state_dict(dict(zip(("weight", "bias"), new)))
    for p, value in zip(params, new):
        if way == "data":
            p.data.copy_(value)
        if way == "copy_":
            p.detach().copy_(value)
        if way == "swap":
            p.data = value.clone()
    set_grads(params, 7)
    x = [3.0 - p.grad.float() * 2**-9 for p in params]
    opt.step()
    key = KEYS[precision]
    if precision == "master":
        assert same_bits(held(opt, params, key), x)
    assert same_bits(params, [v.to(BF16) for v in x])


@pytest.mark.asked(triton=NONE, simt=NONE)
@each_precision
def test_what_is_pruned_stays(engine, precision):
    params = halves(engine)
    opt = layerlr.SGD(params, 2**-9, backend=engine.backend, precision=precision)
    train(opt, params, 3)
    for p in params:
        p.detach().zero_()
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all((p == 0).all() for p in params)
