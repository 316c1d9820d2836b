"""AdamC: decoupled weight decay in proportion to lr."""

from __future__ import annotations

import pytest
import torch
from cases import random, same_bits, set_grads
from torch.nn import Parameter

import layerlr

FAMILIES = [
    (layerlr.AdamW, {}),
    (layerlr.Lion, {}),
    (layerlr.Adam, {"decoupled_weight_decay": True}),
]


def pair(cls, more, **kwargs):
    made = []
    for corrected in (True, False):
        params = [Parameter(x) for x in random([(5, 4), (4,)])]
        options = {**more, **kwargs, "corrected_decay": corrected}
        made.append((params, cls(params, weight_decay=0.3, **options)))
    return made


@pytest.mark.parametrize("rule", [None, "lars", "lamb", "relative"])
@pytest.mark.parametrize(("cls", "more"), FAMILIES)
def test_is_a_decay_that_is_scheduled_by_hand(cls, more, rule):
    (ours, opt), (theirs, twin) = pair(cls, more, lr=0.1, rule=rule)
    for step, lr in enumerate((0.02, 0.1, 0.05, 0.0, 0.01)):
        opt.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = lr
        twin.param_groups[0]["weight_decay"] = 0.3 * lr / 0.1
        set_grads(ours, step)
        set_grads(theirs, step)
        opt.step()
        twin.step()
        assert same_bits(ours, theirs)
    assert opt.param_groups[0]["reference_lr"] == 0.1 and opt.param_groups[0]["weight_decay"] == 0.3


def test_resumes():
    (ours, opt), (theirs, _) = pair(layerlr.AdamW, {}, lr=0.1)
    opt.param_groups[0]["lr"] = 0.03
    set_grads(ours, 0)
    opt.step()
    other = layerlr.AdamW(theirs, lr=0.5, corrected_decay=True)
    other.load_state_dict(opt.state_dict())
    group = other.param_groups[0]
    assert group["corrected_decay"] and (group["reference_lr"], group["lr"]) == (0.1, 0.03)


def test_refusals():
    (p,) = [Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match="is for decoupled weight decay: use AdamW"):
        layerlr.SGD([p], lr=0.1, corrected_decay=True)
    with pytest.raises(ValueError, match="corrected_decay follows lr by its ratio, and lr of"):
        layerlr.AdamW([p], lr=0.0, corrected_decay=True)
    opt = layerlr.AdamW([p], lr=0.2)
    assert "reference_lr" not in opt.param_groups[0]
    opt.param_groups[0]["corrected_decay"] = True  # from here on, by the lr that it has now
    p.grad = torch.ones_like(p)
    opt.step()
    assert opt.param_groups[0]["reference_lr"] == 0.2
