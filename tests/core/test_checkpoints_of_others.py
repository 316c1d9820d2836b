"""State dicts that say something else than the optimizer they are loaded into."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from cases import random, same_bits, set_grads
from selection import NONE
from torch.nn import Parameter

import layerlr

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


def weights():
    return [Parameter(v) for v in random(((6, 5), (5,)))]


def train(opt, params, steps):
    for step in range(steps):
        set_grads(params, step)
        opt.step()
    return opt


CHANGED = {
    "a rule that was forgotten": ({}, {"rule": "lamb", "plain_lr": 0.004}, ["rule", "plain_lr"]),
    "another rule": ({"rule": "layca"}, {"rule": "lamb"}, ["rule"]),
    "clipping": ({}, {"max_grad_norm": 1.0}, ["max_grad_norm"]),
    "the other way": ({"rule": "lamb", "adapt": "all"}, {"rule": "lamb"}, ["adapt"]),
}


@pytest.mark.parametrize("what", CHANGED)
def test_options_that_a_state_dict_replaces_are_named(what):
    saved, own, keys = CHANGED[what]
    theirs = layerlr.AdamW(weights(), lr=0.01, **saved)
    ours = layerlr.AdamW([{"params": [p]} for p in weights()], lr=0.01, **own)
    packed = theirs.state_dict()
    packed["param_groups"] = [packed["param_groups"][0] | {"params": [k]} for k in range(2)]
    with pytest.warns(UserWarning) as caught:
        ours.load_state_dict(packed)
    said = [str(w.message) for w in caught]
    assert len(said) == len(keys)  # both groups in one
    for key in keys:
        [message] = [m for m in said if m.startswith(f"{key}=")]
        assert "came with the state dict and replaces" in message
        assert f"in param group 0, 1: to have it back, set the group's {key!r}" in message


def test_an_equal_state_dict_says_nothing():
    options = {"rule": {"name": "lamb", "clip": 2.0}, "plain_lr": 0.1, "max_grad_norm": 1.0}
    one, two = (layerlr.AdamW(weights(), lr=0.01, **options) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.load_state_dict(one.state_dict())
        two.load_state_dict(torch.optim.AdamW(weights()).state_dict())  # which has none of them
    assert two.param_groups[0]["plain_lr"] == 0.1


def test_a_count_in_the_group():
    """apex and pytorch_optimizer have it there."""
    ours, theirs = weights(), weights()
    torchs = train(torch.optim.AdamW(theirs, lr=0.01), theirs, 50)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    packed = copy.deepcopy(torchs.state_dict())
    for state in packed["state"].values():
        del state["step"]
    packed["param_groups"][0]["step"] = 50
    opt = layerlr.AdamW(ours, lr=0.01, backend="reference")
    opt.load_state_dict(packed)
    assert [opt.state[p]["step"].item() for p in ours] == [50.0, 50.0]
    train(opt, ours, 1), train(torchs, theirs, 1)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("saved", [layerlr.RMSprop, torch.optim.RMSprop])
def test_moments_of_another_optimizer(saved):
    """They start afresh, and the count with them: 3,000 steps on, a new moment is far too small."""
    params = weights()
    opt = train(saved(params, lr=1e-4), params, 3)
    ours = layerlr.AdamW(weights(), lr=0.01)
    with pytest.warns(UserWarning, match="'square_avg', as another optimizer's has.*at step 0"):
        ours.load_state_dict(opt.state_dict())
    assert {state["step"].item() for state in ours.state.values()} == {0.0}
    assert all(not state["exp_avg"].any() for state in ours.state.values())


def test_a_momentum_that_is_new_says_nothing():
    params = weights()
    opt = train(torch.optim.SGD(params, lr=0.1), params, 2)
    ours = layerlr.SGD(weights(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("step", [-3, float("nan"), 2.5])
def test_a_count_in_the_group_that_is_none(step):
    packed = train(layerlr.AdamW(params := weights(), lr=0.01), params, 1).state_dict()
    for state in packed["state"].values():
        del state["step"]
    packed["param_groups"][0]["step"] = step
    with pytest.raises(RuntimeError, match="wanted is the number of steps"):
        layerlr.AdamW(weights(), lr=0.01).load_state_dict(packed)


def test_moments_without_a_count_of_another_optimizer():
    """A momentum buffer, for one; a count in the group is not theirs."""
    params = weights()
    packed = train(torch.optim.SGD(params, lr=0.1, momentum=0.9), params, 2).state_dict()
    packed["param_groups"][0]["step"] = 50
    ours = layerlr.AdamW(weights(), lr=0.01)
    with pytest.warns(UserWarning, match="'momentum_buffer', as another optimizer's has"):
        ours.load_state_dict(packed)
    assert {state["step"].item() for state in ours.state.values()} == {0.0}


@pytest.mark.parametrize("options", [{"rule": "hyperball"}, {"precision": "master"}])
def test_moments_that_a_program_resets(options):
    """What a rule and ``precision`` store is no other optimizer's."""
    params = [Parameter(v.bfloat16()) for v in random(((6, 5),))]
    opt = train(layerlr.AdamW(params, lr=0.01, **options), params, 1)
    for state in opt.state.values():
        del state["exp_avg"], state["exp_avg_sq"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, params, 1)


def test_a_rule_that_is_set_by_its_name_is_the_same():
    opt = layerlr.AdamW(weights(), lr=0.01, rule="layca")
    packed = opt.state_dict()
    opt.param_groups[0]["rule"] = "layca"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(packed)


def test_numbers_of_numpy_can_be_loaded_with_weights_alone():
    params = weights()
    opt = layerlr.Adam([{"params": params, "lr_factor": np.ones(2)}], max_grad_norm=np.float64(1.0))
    opt.param_groups[0].update(lr=np.float64(0.1), betas=(np.float64(0.8), 0.9))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    [group] = torch.load(file, weights_only=True)["param_groups"]
    assert type(group["max_grad_norm"]) is float and group["lr_factor"] == [1.0, 1.0]
    assert group["lr"] == 0.1 and group["betas"] == (0.8, 0.9)


def test_rates_under_their_former_name():
    params = weights()
    opt = layerlr.SGD([{"params": params, "lr_factor": [1.0, 1.0]}], rule="singh")
    packed = opt.state_dict()
    del packed["param_groups"][0]["lr_factor"]
    packed["param_groups"][0]["lr_scale"] = [0.5, 0.25]
    opt.load_state_dict(packed)
    assert opt.param_groups[0]["lr_factor"] == [0.5, 0.25]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_narrow_moments_become_float32(half):
    """As torch has them of such weights; exactly, and every engine takes them then."""
    values = [v.to(half) for v in random(((6, 5), (5,)))]
    params, theirs = ([Parameter(v.clone()) for v in values] for _ in range(2))
    torchs = train(torch.optim.Adam(theirs), theirs, 2)
    opt = layerlr.Adam(params, backend="cpu")
    opt.load_state_dict(torchs.state_dict())
    for p, q in zip(params, theirs, strict=True):
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        assert same_bits([opt.state[p]["exp_avg"]], [torchs.state[q]["exp_avg"].float()])
    set_grads(params, 5)
    opt.step()
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(params, theirs))
