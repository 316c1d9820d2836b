"""Stepping inside backward: what is refused, before anything steps."""

from __future__ import annotations

import pytest
import torch
from backward_nets import no_grads
from cases import copies, same_bits
from selection import NONE
from torch import nn

import layerlr
from layerlr import rules

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


class Ddp(nn.parallel.DistributedDataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def listed_twice(net):
    with pytest.warns(UserWarning, match="duplicate parameters"):
        return layerlr.SGD([net.weight, net.weight, net.bias])


@pytest.mark.parametrize(
    "make, error, words",
    [
        (
            lambda n: (n, torch.optim.SGD(n.parameters())),
            TypeError,
            "optimizer of layerlr, got SGD",
        ),
        (lambda n: ([n], layerlr.SGD(n.parameters())), TypeError, "torch.nn.Module, got list"),
        (lambda n: (nn.Linear(2, 2), layerlr.SGD(n.parameters())), ValueError, "none of the model"),
        (lambda n: (Ddp(n), layerlr.SGD(n.parameters())), ValueError, "DistributedDataParallel"),
        (
            lambda n: (n, layerlr.SGD(n.parameters(), rule="curvature")),
            ValueError,
            "rule 'curvature', which looks at the model",
        ),
        (
            lambda n: (n, layerlr.SGD(n.parameters(), rule=rules.BackMatching())),
            ValueError,
            "rule 'backmatching'",
        ),
        (
            lambda n: (n, layerlr.SGD([{"params": n.parameters(), "max_grad_norm": 1.0}])),
            ValueError,
            "max_grad_norm",
        ),
        (lambda n: (n, listed_twice(n)), ValueError, "a parameter that is listed twice"),
        (
            lambda n: (n, layerlr.SGD(n.parameters(), differentiable=True)),
            ValueError,
            "differentiable=True",
        ),
    ],
)
def test_refusals(make, error, words):
    net = nn.Linear(2, 2)
    model, opt = make(net)
    with pytest.raises(error, match=words):
        layerlr.step_in_backward(model, opt)
    before = copies(net.parameters())
    net(torch.ones(1, 2)).sum().backward()  # nothing was left behind
    assert same_bits(before, net.parameters()) and not no_grads(net)


def test_a_second_handle_is_refused():
    net = nn.Linear(2, 2)
    opt = layerlr.SGD(net.parameters())
    layerlr.step_in_backward(net, opt)
    with pytest.raises(RuntimeError, match="steps in backward already"):
        layerlr.step_in_backward(net, opt)


@pytest.mark.parametrize("change", [{"rule": "curvature"}, {"max_grad_norm": 1.0}], ids=str)
def test_settings_that_change_later_are_refused_before_anything_steps(change):
    net = nn.Linear(2, 2)
    opt = layerlr.SGD(net.parameters(), rule="lars", lr=0.1)
    layerlr.step_in_backward(net, opt)
    opt.param_groups[0].update(change)
    before = copies(net.parameters())
    with pytest.raises(ValueError, match="step_in_backward does not work with"):
        net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="step_in_backward does not work with"):
        opt.step()
    assert same_bits(before, net.parameters())


def test_no_max_grad_norm_is_none():
    net = nn.Linear(2, 2)
    opt = layerlr.SGD([{"params": net.parameters(), "max_grad_norm": None}])
    layerlr.step_in_backward(net, opt)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling_is_refused(fused):
    net = nn.Linear(2, 2)
    opt = layerlr.SGD(net.parameters(), fused=fused, lr=0.1)
    layerlr.step_in_backward(net, opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    with pytest.raises((RuntimeError, AssertionError)):
        scaler.step(opt)
