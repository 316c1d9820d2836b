"""CUDA graphs, as far as the emulation records launches: what a replay reads, what is refused."""

from __future__ import annotations

import contextlib
import os
import weakref

import cases
import pytest
import simt_engine
import torch
from cases import BY_ID, copies, same_bits, set_grads
from torch.nn import Parameter

import layerlr
from layerlr import _C, devices
from layerlr.backends import BACKENDS

missing = simt_engine.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")

SHAPES = ((3, 700), (5,), (20, 30))
CASES = [
    "sgd-none",
    "nag-none",
    "adamw-none",
    "adam-mini",
    "nag-lars",
    "mom-singh",
    "adamw-layca",
    "ams-lamb",
]


@pytest.fixture
def capture(monkeypatch):
    """A context in which launches are recorded; parameters of the host stand for a GPU's."""
    library = BACKENDS["simt"].emulation()
    here = []
    monkeypatch.setattr(devices, "capturing", lambda device: bool(here))

    @contextlib.contextmanager
    def capture():
        library.simt_capture(True)
        here.append(True)
        try:
            yield library.simt_replay
        finally:
            here.clear()
            library.simt_capture(False)

    return capture


def two(case, shapes=SHAPES, backends=("simt", "simt")):
    """Optimizers over equal parameters, two groups each, after one step."""
    found = []
    for backend in backends:
        params = [Parameter(v) for v in cases.random(shapes, torch.float32)]
        named = [(str(i), p) for i, p in enumerate(params)]
        opt = BY_ID[case].make([{"params": named[:1]}, {"params": named[1:]}], backend=backend)
        set_grads(params, 0)
        opt.step()
        found.append((opt, params))
    return found


def change(opt, k):
    """What schedulers set, as floats."""
    for i, group in enumerate(opt.param_groups):
        group["lr"] = 0.1 / (k + 1 + i)
        group["weight_decay"] = 0.01 * k
        group["maximize"] = k == 2
        if "betas" in group:
            group["betas"] = 0.9 - 0.1 * k, 0.99 - 0.01 * k
        elif group["momentum"]:
            group["momentum"] = 0.9 - 0.1 * k


def fill_grads(params, seed):
    """Other gradients in the same memory."""
    old = [p.grad for p in params]
    set_grads(params, seed)
    for p, g in zip(params, old, strict=True):
        p.grad = g.copy_(p.grad)


@pytest.mark.parametrize("case", CASES)
def test_replays_read_the_numbers_of_the_moment(case, capture):
    (opt, params), (twin, same) = two(case)
    before = copies(params)
    with capture() as replay:
        opt.step()
    assert same_bits(before, params), "nothing runs in a capture"
    for k in range(4):
        for p in (params, same):
            fill_grads(p, k)
        for o in (opt, twin):
            change(o, k)
        opt.refresh()
        replay()
        twin.step()
        assert same_bits(params, same), k


@pytest.mark.parametrize("case", CASES)
def test_steps_and_replays_take_turns(case, capture):
    """Each with its gradients' addresses; numbers that a step brought are there for replays."""
    (opt, params), (twin, same) = two(case)
    with capture() as replay:
        opt.step()
    of_graph = [p.grad for p in params]
    for k in range(3):
        for p in (params, same):
            set_grads(p, k)  # elsewhere
        for o in (opt, twin):
            change(o, k)
            o.step()
        elsewhere = [p.grad for p in params]
        for p, g in zip(params, of_graph, strict=True):
            p.grad = g
        fill_grads(params, 10 + k)
        set_grads(same, 10 + k)
        replay()
        twin.step()
        assert same_bits(params, same), k
        for p, g in zip(params, elsewhere, strict=True):
            p.grad = g  # where the last step outside had them
        set_grads(same, k)
        opt.step()
        twin.step()
        assert same_bits(params, same), k


def test_a_capture_wants_the_numbers_to_be_there(capture):
    (opt, params), (twin, same) = two("adamw-layca")
    for o in (opt, twin):
        change(o, 1)
    with (
        capture(),
        pytest.raises(RuntimeError, match=r"call optimizer.refresh\(\) before the capt"),
    ):
        opt.step()
    opt.refresh()
    with capture() as replay:
        opt.step()
        with pytest.raises(RuntimeError, match="not within it"):
            opt.refresh()
    replay()
    twin.step()
    assert same_bits(params, same)


def test_a_missing_gradient_is_refused(capture):
    (opt, params), _ = two("adamw-none")
    params[1].grad = None
    with capture(), pytest.raises(RuntimeError, match="'1' has no gradient, and the CUDA graph"):
        opt.step()
    params[1].requires_grad_(False)  # meant
    with capture():
        opt.step()


def test_a_first_step_is_refused(capture):
    params = [Parameter(v) for v in cases.random(SHAPES, torch.float32)]
    opt = layerlr.SGD(params, rule="layca", backend="simt")
    set_grads(params, 0)
    before = copies(params)
    with capture(), pytest.raises(RuntimeError, match="a step with the same parameters and rule"):
        opt.step()
    assert same_bits(before, params)
    opt.step()
    with capture(), pytest.raises(RuntimeError, match="param group 0 is new or has changed"):
        opt.param_groups[0]["rule"] = "lars"
        opt.step()
    with capture(), pytest.raises(RuntimeError, match="param group 1 is new or has changed"):
        opt.add_param_group({"params": [Parameter(torch.ones(3))]})
    assert len(opt.param_groups) == len(opt.plans.groups) == 1


def test_the_reference_is_refused(capture):
    (opt, _), _ = two("adamw-none", backends=("reference", "simt"))
    with capture(), pytest.raises(RuntimeError, match="'reference' takes its numbers from Python"):
        opt.step()


def test_rules_that_look_at_the_model_are_refused(capture):
    p = Parameter(torch.ones(3))
    opt = layerlr.SGD([p], rule="curvature", backend="simt")
    p.grad = torch.ones(3)
    with capture(), pytest.raises(RuntimeError, match="its rule looks at the model"):
        opt.step()


def test_stepping_in_backward_is_refused(capture):
    model = torch.nn.Linear(3, 2)
    opt = layerlr.SGD(model.parameters(), rule="layca", backend="simt")
    layerlr.step_in_backward(model, opt)
    model(torch.ones(3)).sum().backward()
    with capture(), pytest.raises(RuntimeError, match=r"remove\(\) the handle first"):
        model(torch.ones(3)).sum().backward()


def test_a_group_that_is_added(capture):
    """The step outside is right, the old graph goes on without it, refresh() says so."""
    (opt, params), (twin, same) = two("mom-singh")
    with capture() as replay:
        opt.step()
    for o, ps in ((opt, params), (twin, same)):
        ps.append(Parameter(torch.ones(40)))
        o.add_param_group({"params": [("new", ps[-1])], "lr": 0.05})
        fill = cases.random([(40,)], torch.float32)
        ps[-1].grad = fill[0]
    with pytest.raises(RuntimeError, match="param group 2 is new or has changed since"):
        opt.refresh()
    opt.step()
    twin.step()
    assert same_bits(params, same)
    replay()
    same[-1].grad = None
    twin.step()
    assert same_bits(params, same)
    with capture() as replay:
        opt.step()
    opt.refresh()
    replay()
    same[-1].grad = params[-1].grad
    twin.step()
    assert same_bits(params, same)


@pytest.mark.parametrize("flag", [{"on_nonfinite": "skip"}, {"rule": "layca"}], ids=str)
def test_an_old_graph_keeps_its_memory(flag, capture):
    """What it reads is there until release(), though the plans are others by now."""
    (opt, params), (twin, same) = two("mom-none")
    with capture() as replay:
        opt.step()
    for o in (opt, twin):
        o.param_groups[0].update(flag)
        o.step()
    assert same_bits(params, same)
    with pytest.raises(RuntimeError, match="param group 0 is new or has changed since"):
        opt.refresh()
    twin.param_groups[0].update(rule=None, on_nonfinite=None)
    replay()
    twin.step()
    assert same_bits(params, same)


def test_freezing_and_thawing(capture):
    (opt, params), (twin, same) = two("mom-singh")
    for ps in (params, same):
        ps[1].requires_grad_(False)
        ps[1].grad = None
    for o in (opt, twin):
        o.step()
    with capture() as replay:
        opt.step()
    replay()
    twin.step()
    assert same_bits(params, same)
    for ps in (params, same):
        ps[1].requires_grad_(True)
        ps[1].grad = torch.ones_like(ps[1])
    for o in (opt, twin):
        o.step()
    assert same_bits(params, same)
    replay()  # without it
    same[1].grad = None
    twin.step()
    assert same_bits(params, same)


@pytest.mark.parametrize("backend", ["simt", "cpu", "reference"])
def test_release(backend):
    (opt, params), (twin, same) = two("adamw-layca", backends=(backend, backend))
    opt.release()
    assert not any(plans.plans for plans in opt.plans) and not opt._graphs.plans
    mine, theirs = opt.layer_stats(), twin.layer_stats()
    for key in mine.keys() - {"names"}:
        assert torch.equal(mine[key], theirs[key]), key
    for k in range(2):
        opt.release()
        for o, ps in ((opt, params), (twin, same)):
            set_grads(ps, k)
            o.step()
        assert same_bits(params, same)


def test_released_plans_are_gone(capture):
    (opt, _), _ = two("adamw-layca")
    with capture():
        opt.step()
    plans = [weakref.ref(plan) for group in opt.plans for plan in group.plans]
    opt.release()
    assert plans and not any(ref() for ref in plans)
    with pytest.raises(RuntimeError, match="param group 0 is new or has changed"):
        opt.refresh()


def test_refresh_outside_of_graphs_changes_nothing():
    for backend in ("cpu", "reference", "simt"):
        (opt, params), (twin, same) = two("adamw-layca", backends=(backend, backend))
        change(opt, 1), change(twin, 1)
        opt.refresh()
        opt.step(), twin.step()
        assert same_bits(params, same)


def test_triton_keeps_the_tables_of_graphs_apart(capture):
    """Its launches run here, captured or not: which memory they read is what can be seen."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(reason="Triton runs on the GPU here, and not on tensors of the host")
    (opt, params), _ = two("mom-singh", backends=("triton", "triton"))
    plan = opt.plans.groups[0].plans[0]
    with capture():
        opt.step()
    of_graph = plan._tables
    rows, config = of_graph.tensors.clone(), of_graph.config.clone()
    set_grads(params, 3)
    opt.step()
    assert plan._tables.tensors is not of_graph.tensors and torch.equal(of_graph.tensors, rows)
    assert plan._tables.config is of_graph.config and torch.equal(of_graph.config, config)
    opt.param_groups[0].update(lr=0.25, momentum=0.5)
    opt.refresh()
    assert of_graph.config[0] == 0.25 and of_graph.config[_C.CONFIG["direction"]] == 0.5
    opt.param_groups[0]["lr"] = 0.125
    with capture(), pytest.raises(RuntimeError, match=r"same numbers \(optimizer.refresh\(\)\)"):
        opt.step()
