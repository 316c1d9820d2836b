"""Stepping inside backward: what may change meanwhile, hooks, threads, lifetime."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from backward_nets import MOM, Net, both, equal, few, loss_of, no_grads, pair
from cases import BY_ID, copies, same_bits
from selection import NONE
from torch import nn

import layerlr
from layerlr import rules

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


# -- what changes while it runs ------------------------------------------------------------------


def test_schedulers_rates_and_closures(engine):
    nets, opts, _ = pair(engine, BY_ID["adamw-layca"])
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5) for opt in opts]
    for seed in range(3):
        both(nets, opts, seed, engine.device)
        for s in schedulers:
            s.step()
    for net, opt in zip(nets, opts):

        def closure(net=net, opt=opt):
            opt.zero_grad()
            loss = loss_of(net, 9, engine.device)
            loss.backward()
            return loss

        opt.step(closure)
    assert equal(nets, opts)


def test_rate_on_the_device(engine):
    nets, opts, _ = pair(engine, MOM, lr=torch.tensor(0.1, device=engine.device))
    for seed in range(2):
        both(nets, opts, seed, engine.device)
        for opt in opts:
            opt.param_groups[0]["lr"].mul_(0.5)
    assert equal(nets, opts)


def test_group_options_that_change_plans(engine):
    nets, opts, _ = pair(engine, MOM)
    for seed, change in enumerate(
        ({"lr_factor": 0.3}, {"rule": rules.Layca()}, {"rule": None}, {"weight_decay": 0.2})
    ):
        for opt in opts:
            opt.param_groups[0].update(change)
        both(nets, opts, seed, engine.device)
        assert equal(nets, opts)


@few
def test_state_dict_in_the_midst(engine, tmp_path):
    nets, opts, _ = pair(engine, BY_ID["adamw-layca"], layers="module")
    both(nets, opts, 0, engine.device)
    torch.save([opts[1].state_dict(), nets[1].state_dict()], tmp_path / "run")
    both(nets, opts, 1, engine.device)
    for net, opt in zip(nets, opts):
        packed = torch.load(tmp_path / "run", weights_only=True)
        opt.load_state_dict(packed[0])
        net.load_state_dict(packed[1])
    both(nets, opts, 2, engine.device, step=False)
    assert equal(nets, opts)
    assert no_grads(nets[1])


def test_state_that_is_replaced(engine):
    nets, opts, _ = pair(engine, MOM)
    both(nets, opts, 0, engine.device)
    for net, opt in zip(nets, opts):
        state = opt.state[net.out.weight]
        state["momentum_buffer"] = state["momentum_buffer"] * 2
        del opt.state[net.tied.weight]
    both(nets, opts, 1, engine.device, step=False)
    assert equal(nets, opts)


def test_a_buffer_that_is_replaced(engine):
    """The state dict stays, what is in it does not: a plan finds that out by itself."""
    nets, opts, _ = pair(engine, MOM, layers="module", adapt="all")
    both(nets, opts, 0, engine.device)
    for net, opt in zip(nets, opts):
        state = opt.state[net.out.weight]
        state["momentum_buffer"] = state["momentum_buffer"] * 2
    both(nets, opts, 1, engine.device, step=False)
    assert equal(nets, opts)
    both(nets, opts, 2, engine.device, step=False)
    assert no_grads(nets[1])
    assert equal(nets, opts)


def test_parameters_that_are_added_and_unfrozen(engine):
    nets = Net(), Net()
    opts = []
    for net in nets:
        net.to(engine.device)
        net.out.requires_grad_(False)
        params = [p for n, p in net.named_parameters() if not n.startswith("extra")]
        opts.append(engine.make(MOM, params))
    handle = layerlr.step_in_backward(nets[1], opts[1])
    both(nets, opts, 0, engine.device)
    for net, opt in zip(nets, opts):
        opt.add_param_group({"params": list(net.extra.parameters())})
        net.out.requires_grad_()
        net.zero_grad()
    for seed in range(1, 4):
        both(nets, opts, seed, engine.device)
    assert equal(nets, opts)
    loss_of(nets[1], 4, engine.device).backward()
    assert no_grads(nets[1])
    assert "12 parameters in 12 units" in repr(handle)


def test_a_model_that_was_frozen():
    """No hook fires before one is registered: step() does it, also where nothing stepped."""
    nets = Net().requires_grad_(False), Net().requires_grad_(False)
    opts = [layerlr.SGD(net.parameters(), lr=0.1, rule="lars") for net in nets]
    layerlr.step_in_backward(nets[1], opts[1])
    for net in nets:
        net.requires_grad_()
    both(nets, opts, 0)
    both(nets, opts, 1, step=False)
    assert no_grads(nets[1])
    assert equal(nets, opts)


def test_a_part_of_the_model(engine):
    """Parameters that are not the model's step in step(), and keep their gradients."""
    nets = Net().to(engine.device), Net().to(engine.device)
    opts = [engine.make(MOM, list(net.parameters())) for net in nets]
    layerlr.step_in_backward(nets[1].qkv, opts[1])
    loss = both(nets, opts, 0, engine.device, step=False)
    assert loss.isfinite()
    assert nets[1].qkv.weight.grad is None and nets[1].out.weight.grad is not None
    opts[1].step()
    assert equal(nets, opts)
    assert nets[1].out.weight.grad is not None


def test_frozen_others_and_bad_gradients(engine):
    nets, opts, _ = pair(engine, BY_ID["mom-layca-frozen"])
    both(nets, opts, 0, engine.device)
    for net in nets:
        net.tied.weight.register_hook(lambda g: g * float("nan"))
    both(nets, opts, 1, engine.device)
    assert opts[1].layer_stats()["skipped"].sum() == 1
    assert equal(nets, opts)


# -- hooks, threads, lifetime --------------------------------------------------------------------


def test_users_hooks():
    """Before ours a hook sees the gradient, after ours None; tensor hooks change it."""
    nets = nn.Linear(2, 2), nn.Linear(2, 2)
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [layerlr.SGD(n.parameters(), lr=0.1, rule="singh") for n in nets]
    seen = []
    nets[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    layerlr.step_in_backward(nets[1], opts[1])
    nets[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    calls = []
    opts[1].register_step_pre_hook(lambda *_: calls.append("pre"))
    opts[1].register_step_post_hook(lambda *_: calls.append("post"))
    for n in nets:
        n.weight.register_hook(lambda g: 2 * g)
        n(torch.ones(1, 2)).square().sum().backward()
    assert same_bits([seen[0]], [nets[0].weight.grad]) and seen[1] is None
    for opt in opts:
        opt.step()
    assert equal(nets, opts)
    assert calls == ["pre", "post"]


def test_backwards_of_many_threads():
    """Models of their own under one optimizer; every layer steps as alone."""
    nets = [nn.ModuleList(nn.Linear(3, 3) for _ in range(4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [layerlr.AdamW(n.parameters(), lr=0.01, rule="lamb") for n in nets]
    layerlr.step_in_backward(nets[1], opts[1])
    x = torch.randn(2, 3)

    def run(part):
        for _ in range(20):
            part(x).square().sum().backward()

    threads = [threading.Thread(target=run, args=(part,)) for part in nets[1]]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for _ in range(20):
        for part in nets[0]:
            part(x).square().sum().backward()
        opts[0].step()
        opts[0].zero_grad()
    assert equal(nets, opts)


def test_one_thread_at_a_time():
    net = nn.Linear(2, 2)
    handle = layerlr.step_in_backward(net, layerlr.SGD(net.parameters(), lr=0.1))
    thread = threading.Thread(target=lambda: net(torch.ones(1, 2)).sum().backward())
    before = copies(net.parameters())
    with handle._lock:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and same_bits(before, net.parameters())
    thread.join()
    assert no_grads(net) and not same_bits(before, net.parameters())


def test_remove(engine):
    nets, opts, handle = pair(engine, MOM)
    both(nets, opts, 0, engine.device)
    handle.remove()
    handle.remove()
    before = copies(nets[1].parameters())
    loss_of(nets[1], 1, engine.device).backward()
    assert same_bits(before, nets[1].parameters()) and not no_grads(nets[1])
    opts[1].step()
    assert not no_grads(nets[1])
    opts[1].zero_grad()
    loss_of(nets[0], 1, engine.device).backward()
    opts[0].step()
    opts[0].zero_grad()
    layerlr.step_in_backward(nets[1], opts[1])
    both(nets, opts, 2, engine.device, step=False)
    assert equal(nets, opts)


def test_nothing_is_kept_alive():
    net = nn.Linear(2, 2)
    opt = layerlr.SGD(net.parameters(), lr=0.1)
    layerlr.step_in_backward(net, opt)
    net(torch.ones(1, 2)).sum().backward()
    dead = weakref.ref(opt)
    del opt
    gc.collect()
    assert dead() is None
    before = copies(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    assert same_bits(before, net.parameters())
    dead = weakref.ref(net)
    del net
    gc.collect()
    assert dead() is None
