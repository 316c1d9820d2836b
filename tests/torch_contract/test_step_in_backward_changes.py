"""Stepping inside backward: what may change meanwhile, models, hooks, threads, refusals."""

from __future__ import annotations

import gc
import json
import threading
import weakref

import pytest
import torch
from backward_nets import MOM, Net, batch, both, equal, few, halves, loss_of, no_grads, pair
from cases import BY_ID, copies, same_bits
from selection import NONE
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import layerlr
from bench import step_in_backward as bench
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


# -- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(engine, reentrant):
    nets, opts, _ = pair(engine, MOM, layers="module")
    for net in nets:
        for name in ("qkv", "norm", "extra"):
            part = getattr(net, name)
            plain = type(part).forward

            def again(x, part=part, plain=plain):
                return checkpoint(plain, part, x, use_reentrant=reentrant)

            part.forward = again
    for seed in range(2):
        both(nets, opts, seed, engine.device, step=False)
        assert no_grads(nets[1])
    assert equal(nets, opts)


def test_tied_parameters_step_once_a_pass():
    w = Parameter(torch.randn(3, 3))
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    a.weight = b.weight = w
    net = nn.Sequential(a, nn.Tanh(), b)
    opt = layerlr.SGD(net.parameters(), lr=0.1, rule="lars")
    layerlr.step_in_backward(net, opt)
    calls = []
    w.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad))
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
    assert calls == [None, None]
    assert opt.state[w]["step"] == 2


def test_compiled_model(engine):
    nets, opts, _ = pair(engine, MOM, layers="module")
    compiled = [torch.compile(net, backend="aot_eager") for net in nets]
    for seed in range(2):
        for run in compiled:
            run(batch(seed, device=engine.device)).square().mean().backward()
        opts[0].step()
        opts[0].zero_grad()
        assert no_grads(nets[1])
    assert equal(nets, opts)


def test_the_same_graph_twice():
    nets, opts, handle = halves()
    x = torch.ones(2, 3)
    loss = nets[1](x).mean()
    with handle.accumulate():
        loss.backward(retain_graph=True)
    loss.backward()
    loss = nets[0](x).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    opts[0].step()
    assert equal(nets, opts)
    loss = nets[1](x).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_backward_still_needs_is_an_error_not_a_wrong_gradient():
    net = nn.ParameterDict({"a": torch.randn(3, 3), "b": torch.randn(3, 3)})
    opt = layerlr.SGD(net.parameters(), lr=0.1, rule="lars", backend="cpu")
    layerlr.step_in_backward(net, opt)
    h = (torch.ones(2, 3) @ net["a"]) @ net["b"].detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (h @ net["b"]).sum().backward()


def test_gradients_are_freed_one_by_one():
    """At any time at most one layer's gradient is there."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    opt = layerlr.SGD(net.named_parameters(), lr=0.1, rule="lars", layers="module", adapt="all")
    layerlr.step_in_backward(net, opt)
    most = []
    for p in net.parameters():
        p.register_hook(lambda g: most.append(sum(q.grad is not None for q in net.parameters())))
    net(torch.ones(2, 4)).sum().backward()
    assert len(most) == 12 and max(most) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_gradients_of_several_streams(backend):
    """A layer whose parts come in on streams of their own, under load."""
    side = torch.cuda.Stream()
    nets = [nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    options = {"lr": 0.1, "rule": "lars", "layers": lambda name, p: 0, "backend": backend}
    opts = [layerlr.SGD(n.cuda().named_parameters(), **options) for n in nets]
    layerlr.step_in_backward(nets[1], opts[1])
    x = torch.randn(4096, 512, device="cuda")
    for _ in range(20):
        for net, opt in zip(nets, opts):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                b = net[1](x).square().mean()
            a = net[0](x).square().mean()
            torch.cuda.current_stream().wait_stream(side)
            (a + b).backward()
            opt.step()
            opt.zero_grad()
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


# -- refusals ------------------------------------------------------------------------------------


class Ddp(nn.parallel.DistributedDataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


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


# -- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_sees_the_memory_that_is_saved(threads):
    threads(1)
    case = bench.Case("mini", "SGD", "lars", 1, 4, "cpu", 1)
    plain, ours = (bench.measure_memory(case, arm, 1) for arm in bench.ARMS)
    parameters = bench.count("mini")
    tied = bench.MODELS["mini"].vocabulary * bench.MODELS["mini"].width
    assert plain.step - ours.step > 4 * (parameters - tied) / 2
    assert bench.count("gpt2") == 124_439_808


def test_the_benchmark_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "memory_apart", lambda case, arm, steps: bench.Memory(2**21, 2**22))
    out = tmp_path / "found.json"
    bench.main(["--model", "mini", "--length", "4", "--rounds", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["time"].keys() == {*bench.ARMS, "plain (A/A)"}
    assert found["machine"]["command"].startswith("python -m bench.step_in_backward --model mini")
    assert found["memory"]["plain"] == {"step": 2**21, "resident": 2**22}
    assert "in backward" in capsys.readouterr().out
