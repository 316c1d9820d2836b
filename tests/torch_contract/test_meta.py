"""Optimizers that are made of parameters on ``meta``, as frameworks do that materialise later."""

from __future__ import annotations

import pytest
import torch
from cases import CLASSES, copies, random, same_bits
from contract_helpers import RULES
from selection import NONE
from torch import nn

import layerlr

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


def on_meta():
    with torch.device("meta"):
        return nn.Linear(3, 4)


def fill(model):
    with torch.no_grad():
        for p, value in zip(model.parameters(), random(((4, 3), (4,)), torch.float32)):
            p.copy_(value)


def train(model, opt, steps=3):
    for seed in range(steps):
        for p, g in zip(model.parameters(), random(((4, 3), (4,)), torch.float32, seed=seed + 1)):
            p.grad = g
        opt.step()


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rule", RULES)
def test_materialised_by_swapping(swapping, cls, rule, fused):
    """The same bits as an optimizer that is made afterwards; state on meta held nothing."""
    if fused and cls is layerlr.RMSprop:
        pytest.skip(reason="torch's RMSprop has no fused")
    flags = {"fused": True} if fused else {}
    model = on_meta()
    opt = cls(model.named_parameters(), lr=0.1, rule=rule, **flags)
    model.to_empty(device="cpu")
    fill(model)
    train(model, opt)
    late = nn.Linear(3, 4)
    fill(late)
    train(late, cls(late.named_parameters(), lr=0.1, rule=rule, **flags))
    assert same_bits(list(model.parameters()), copies(late.parameters()))
    assert all(x.device.type == "cpu" for state in opt.state.values() for x in state.values())
    assert opt.layer_stats()["ww"].device.type == "cpu"


def test_a_step_on_meta():
    """It computes nothing; with fused=True torch raises, and this is a no-op as without."""
    for fused in (False, True):
        model = on_meta()
        opt = layerlr.AdamW(model.parameters(), rule="lamb", fused=fused)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
        assert all(p.is_meta for p in model.parameters())
    theirs = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point"):
        theirs.step()
