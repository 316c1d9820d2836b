"""Stepping inside backward: kinds of models, and their memory."""

from __future__ import annotations

import json

import pytest
import torch
from backward_nets import MOM, batch, both, equal, halves, no_grads, pair
from selection import NONE
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

import layerlr
from bench import step_in_backward as bench

pytestmark = pytest.mark.asked(triton=NONE, simt=NONE)


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
