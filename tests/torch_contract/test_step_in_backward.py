"""Stepping inside backward: the plain loop's bits, accumulation, incomplete passes."""

from __future__ import annotations

import cases
import pytest
import torch
from backward_nets import FEW, MOM, Net, both, equal, few, halves, loss_of, no_grads, pair
from cases import BY_ID, CASES, copies, ids, same_bits
from selection import NONE
from torch import nn
from torch.nn import Parameter

import layerlr
from layerlr import steppable

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)
#: every rule; what steps when is no question of the direction, and the rows of AdamW have what its
#: state adds
ROWS = [BY_ID[f"nag-{r}"] for r in cases.RULE_ROWS]
ROWS += [BY_ID[f"adamw-{r}"] for r in ("none", "lars", "lamb")]


# -- the plain loop's bits -----------------------------------------------------------------------


#: of modules the rules alone: which parameters wait for each other is settled before the step
LAYERED = [pytest.param(case, "tensor", id=f"{case.id}-tensor") for case in CASES]
LAYERED += [pytest.param(case, "module", id=f"{case.id}-module") for case in ROWS]


@few
@pytest.mark.quick(triton=FEW[:1])  # it steps layer by layer; its kernels are asked elsewhere
@pytest.mark.parametrize(("case", "layers"), LAYERED)
def test_equals_the_plain_loop(engine, case, layers):
    nets, opts, _ = pair(engine, case, layers=layers)
    for seed in range(3):
        both(nets, opts, seed, engine.device)
        assert no_grads(nets[1])
    assert equal(nets, opts)
    assert not same_bits(nets[1].parameters(), Net().to(engine.device).parameters())


@pytest.mark.parametrize("case", ROWS, ids=ids(ROWS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(engine, case, dtype):
    nets, opts, _ = pair(engine, case, dtype)
    for seed in range(2):
        both(nets, opts, seed, engine.device)
    assert equal(nets, opts)


def test_state_that_is_cleared_before_the_first_pass(engine):
    """The units' plans are built at their first step, over the state that there is then."""
    nets, opts, _ = pair(engine, BY_ID["adamw-lamb"])
    for net, opt in zip(nets, opts):
        opt.state[net.out.weight].clear()
        opt.state[net.out.bias]["exp_avg"] = None
    for seed in range(2):
        both(nets, opts, seed, engine.device)
    assert equal(nets, opts)


@pytest.mark.parametrize("case", ROWS, ids=ids(ROWS))
@pytest.mark.parametrize("layers", ["tensor", "module"])
@pytest.mark.parametrize("split", [3, [5, 13], [1] * 18], ids=str)
def test_split(engine, case, layers, split):
    nets, opts, handle = pair(engine, case, split=split, layers=layers, adapt="all")
    for seed in range(2):
        both(nets, opts, seed, engine.device, step=False)
        assert no_grads(nets[1])
    assert equal(nets, opts)
    assert handle._units[id(nets[1].qkv.weight)].spec.table.params[0] is nets[1].qkv.weight


@pytest.mark.parametrize("rule", cases.RULE_ROWS)
def test_a_layer_of_tensors_far_apart(engine, rule):
    """The first and the last of backward; it waits for both."""

    def layers(name, p):
        return "a" if "embed" in name or "out" in name else name

    case = BY_ID[f"mom-{rule}"]
    nets, opts, handle = pair(engine, case, layers=layers, adapt="kernels")
    for seed in range(3):
        both(nets, opts, seed, engine.device, step=False)
        assert no_grads(nets[1])
    assert equal(nets, opts)
    a, b = (handle._units[id(getattr(nets[1], n).weight)] for n in ("embed", "out"))
    assert a is b


def test_units_are_what_hangs_together():
    ws = [Parameter(v) for v in cases.random([(4, 3)] * 3)]
    named = list(zip(("a", "b", "c"), ws))

    def found(*groups, **options):
        opt = layerlr.SGD(list(groups), lr=0.1, rule="lars", **options)
        return [u for i in range(len(groups)) for u in steppable.units(i, opt.plans.fitting(i))]

    apart = found({"params": named, "split": 2})
    assert [u.layers for u in apart] == [[0, 1], [2, 3], [4, 5]]
    outer = found({"params": named, "split": 2}, layers=lambda name, p: name == "b")
    assert [u.layers for u in outer] == [[0, 1], [2, 3]]
    assert [u.spec.table.names for u in outer] == [["a", "c"], ["b"]]
    plain = found({"params": named, "split": 2}, adapt=lambda name, p: name != "b")
    assert [u.layers for u in plain] == [[0, 1], [2], [3, 4]]
    grouped = found({"params": named[:1], "split": 4}, {"params": named[1:]}, layers="module")
    assert [(u.group, u.layers) for u in grouped] == [(0, [0, 1, 2, 3]), (1, [0])]


# -- accumulation --------------------------------------------------------------------------------


@few
@pytest.mark.parametrize("case", ROWS, ids=ids(ROWS))
def test_accumulation(engine, case):
    nets, opts, handle = pair(engine, case, layers="module")
    for step in range(2):
        before = copies(nets[1].parameters())
        for micro in range(3):
            loss_of(nets[0], 10 * step + micro, engine.device).backward()
        opts[0].step()
        opts[0].zero_grad()
        for micro in range(2):
            with handle.accumulate():
                with handle.accumulate():
                    loss_of(nets[1], 10 * step + micro, engine.device).backward()
                assert same_bits(before, nets[1].parameters())
                assert not no_grads(nets[1])
        loss_of(nets[1], 10 * step + 2, engine.device).backward()
        assert no_grads(nets[1])
    assert equal(nets, opts)


def test_a_layer_without_a_gradient_in_the_last_batch_steps_in_step(engine):
    nets, opts, handle = pair(engine, MOM)
    for net in nets:
        with handle.accumulate():
            loss_of(net, 0, engine.device).backward()
        net.use_extra = False
        loss_of(net, 1, engine.device).backward()
    opts[0].step()
    assert nets[1].extra.weight.grad is not None and nets[1].out.weight.grad is None
    opts[1].step()
    assert no_grads(nets[1])
    assert equal(nets, opts)


def test_step_within_accumulate(engine):
    nets, opts, handle = pair(engine, MOM)
    with handle.accumulate():
        both(nets, opts, 0, engine.device)
    assert no_grads(nets[1])
    assert equal(nets, opts)


def test_two_backwards_are_two_steps(engine):
    nets, opts, _ = pair(engine, MOM)
    for seed in range(2):
        both(nets, opts, seed, engine.device, step=False)
    assert equal(nets, opts)


def test_an_incomplete_layer_waits_for_step():
    nets, opts, _ = halves()
    for use in ("a", "b", "ab", "ba", "b", "aab"):
        for net, opt in zip(nets, opts):
            net.use = use
            net(torch.ones(2, 3)).square().mean().backward()
            if net is nets[1] and len(set(use)) == 1:
                assert getattr(net, use[0]).grad is not None
            opt.step()
            opt.zero_grad()
        assert equal(nets, opts)


def test_a_pass_that_was_left_incomplete_does_not_count():
    """Without step() its gradients stay; the next pass adds to them and counts anew."""
    nets, opts, _ = halves()
    x = torch.ones(2, 3)
    for net in nets:
        net.use = "a"
        net(x).mean().backward()
        net.use = "ab"  # b's gradient comes first
        net(x).mean().backward()
    assert no_grads(nets[1])
    opts[0].step()
    assert equal(nets, opts)


def test_leftovers_are_freed_by_step_though_nobody_clears():
    nets, opts, _ = halves()
    for use in ("a", "b", "a"):
        for net, opt in zip(nets, opts):
            net.use = use
            net(torch.ones(2, 3)).mean().backward()
            opt.step()
        opts[0].zero_grad()
    assert no_grads(nets[1])
    assert equal(nets, opts)


def test_backward_to_some_inputs():
    nets, opts, _ = halves()
    for net, opt in zip(nets, opts):
        net(torch.ones(2, 3)).mean().backward(inputs=[net.b])
        opt.step()
        opt.zero_grad()
        torch.autograd.grad(net(torch.ones(2, 3)).mean(), [net.a])
        assert no_grads(net)
    assert equal(nets, opts)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ArithmeticError("in the midst")


def test_after_an_error_in_backward():
    """Layers above it have stepped; what is below, and half a layer, is as it was."""
    nets, opts, _ = halves()
    start = copies(nets[1].parameters())
    x = torch.ones(2, 3)
    with pytest.raises(ArithmeticError):
        (Fails.apply(x @ nets[1].a) @ nets[1].b).mean().backward()
    assert same_bits(start, nets[1].parameters())
    assert nets[1].b.grad is not None
    opts[1].zero_grad()
    for _ in range(2):
        for net, opt in zip(nets, opts):
            net(x).mean().backward()
            opt.step()
            opt.zero_grad()
    assert equal(nets, opts)


def test_layers_above_an_error_have_stepped():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = layerlr.SGD(net.parameters(), lr=0.1, rule="lars")
    layerlr.step_in_backward(net, opt)
    before = copies(net.parameters())
    with pytest.raises(ArithmeticError):
        net[1](Fails.apply(net[0](torch.ones(1, 2)))).sum().backward()
    assert same_bits(before[:2], net[0].parameters())
    assert not same_bits(before[2:], net[1].parameters())
    assert no_grads(net)


def test_a_gradient_that_cannot_be_used_is_named():
    net = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    opt = layerlr.SGD(net.named_parameters(), lr=0.1, rule="lars")
    layerlr.step_in_backward(net, opt)
    before = copies(net[0].parameters())
    with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter '0.weight'\)"):
        net(torch.tensor([1])).sum().backward()
    assert same_bits(before, net[0].parameters())
