"""What only a GPU shows: streams, graphs, several devices, and that nobody waits."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import BY_ID, Engine, copies, ids, same_bits, set_grads
from waits import nobody_waits

import layerlr

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES = [BY_ID[f"{d}-{rule}"] for d in ("mom", "adamw") for rule in ("none", "singh", "layca")]
SHAPES = ((300, 400), (33, 70), (5,), (0, 3), (2000, 600))
each_case = pytest.mark.parametrize("case", CASES, ids=ids(CASES))
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


clipped_or_not = pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5}], ids=["", "clipped"]
)


def warm(case, backend, device="cuda", **options):
    """An optimizer that has taken two steps, its parameters with gradients that stay in place."""
    engine = Engine(backend, device)
    params = engine.params(cases.random(SHAPES, seed=3), torch.float32)
    opt = engine.make(case, params, **options)
    set_grads(params, 0)
    for _ in range(2):
        opt.step()
    torch.cuda.synchronize()
    return opt, params


@each_backend
@each_case
def test_current_stream(case, backend):
    (opt, params), (twin, same) = warm(case, backend), warm(case, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # what the step must wait for, on this stream alone
        for p in params:
            p.grad.mul_(2.0)
        opt.step()
        after = copies(params)
    side.synchronize()
    for p in same:
        p.grad.mul_(2.0)
    twin.step()
    assert same_bits(after, same)


@each_backend
@each_case
@clipped_or_not
def test_nobody_waits(case, backend, options):
    opt, _ = warm(case, backend, **options)
    with nobody_waits():
        opt.step()
        opt.layer_stats()


@each_backend
@pytest.mark.parametrize("rule", ["singh", "layca"])
def test_nobody_waits_for_a_wrapper(rule, backend):
    params = Engine(backend, "cuda").params(cases.random(SHAPES, seed=3), torch.float32)
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
    opt = layerlr.wrap(base, rule, lr=0.1, backend=backend)
    set_grads(params, 0)
    opt.step()
    with nobody_waits():
        opt.step()


@each_backend
@each_case
def test_a_step_allocates_nothing(case, backend):
    opt, _ = warm(case, backend)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before <= 4096


@each_backend
@each_case
@clipped_or_not
def test_graph(case, backend, options):
    """Replays are steps: they count, read the gradients of the moment and a tensor lr."""
    rate = torch.tensor(case.args["lr"], device="cuda")
    opt, params = warm(case, backend, lr=rate, **options)
    twin, same = warm(case, backend, lr=rate.clone(), **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for round in range(3):
        for p, q, g in zip(params, same, cases.random(SHAPES, seed=round)):
            p.grad.copy_(g)
            q.grad.copy_(g)
        rate.mul_(0.5)
        twin.param_groups[0]["lr"].mul_(0.5)
        graph.replay()
        twin.step()
        assert same_bits(params, same), round
    assert [s["step"].item() for s in opt.state.values()] == [5.0] * len(params)
    # a step outside, with gradients elsewhere, spoils neither
    set_grads(params, 7)
    set_grads(same, 7)
    opt.step()
    twin.step()
    assert same_bits(params, same)


def captured(opt):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph


def change(opt, k):
    """What schedulers set, as floats."""
    group = opt.param_groups[0]
    group["lr"] = 0.1 / (k + 1)
    group["weight_decay"] = 0.01 * k
    if "betas" in group:
        group["betas"] = 0.9 - 0.1 * k, 0.99 - 0.01 * k
    else:
        group["momentum"] = 0.9 - 0.1 * k


@each_backend
@each_case
def test_graph_refreshed(case, backend):
    """Float lr, weight decay, momentum and betas that change between replays."""
    (opt, params), (twin, same) = warm(case, backend), warm(case, backend)
    graph = captured(opt)
    for k in range(4):
        for p, q, g in zip(params, same, cases.random(SHAPES, seed=k)):
            p.grad.copy_(g)
            q.grad.copy_(g)
        change(opt, k)
        change(twin, k)
        opt.refresh()
        graph.replay()
        twin.step()
        assert same_bits(params, same), k


@each_backend
@each_case
def test_graph_and_steps_take_turns(case, backend):
    """Replays read the graph's gradients, steps outside theirs, which stay in one place."""
    (opt, params), (twin, same) = warm(case, backend), warm(case, backend)
    graph, of_graph = captured(opt), [p.grad for p in params]
    elsewhere = [torch.empty_like(g) for g in of_graph]
    for k in range(6):
        grads, step = ((of_graph, graph.replay), (elsewhere, opt.step))[k % 2]
        for p, q, g, new in zip(params, same, grads, cases.random(SHAPES, seed=k)):
            p.grad = g.copy_(new)
            q.grad.copy_(new)
        step()
        twin.step()
        assert same_bits(params, same), k


@each_backend
def test_graph_of_a_tensor_lr_that_becomes_a_number(backend):
    """Replays go on with the tensor; steps outside take the number each time."""
    rate = torch.tensor(0.1, device="cuda")
    (opt, params), (twin, same) = (
        warm(CASES[-1], backend, lr=rate),
        warm(CASES[-1], backend, lr=rate),
    )
    graph = captured(opt)
    for _ in range(2):
        for o in (opt, twin):
            o.param_groups[0]["lr"] = 0.3
            o.step()
        assert same_bits(params, same)
        graph.replay()
        twin.param_groups[0]["lr"] = rate
        twin.step()
        assert same_bits(params, same)


@each_backend
def test_graph_of_changed_numbers(backend):
    """A capture after a change wants refresh(), as the graph carries no numbers."""
    (opt, params), (twin, same) = warm(CASES[-1], backend), warm(CASES[-1], backend)
    change(opt, 1)
    change(twin, 1)
    with pytest.raises(RuntimeError, match=r"optimizer.refresh\(\)"):
        captured(opt)
    torch.cuda.synchronize()
    opt.refresh()
    captured(opt).replay()
    twin.step()
    assert same_bits(params, same)


@each_backend
def test_graph_without_a_gradient(backend):
    opt, params = warm(CASES[-1], backend)
    params[1].grad = None
    with pytest.raises(RuntimeError, match="has no gradient, and the CUDA graph"):
        captured(opt)


def test_graph_and_a_parameter_of_the_host():
    params = [torch.nn.Parameter(torch.ones(3, device=d)) for d in ("cuda", "cpu")]
    opt = layerlr.SGD(params)
    set_grads(params, 0)
    opt.step()
    with pytest.raises(RuntimeError, match="is on cpu, where nothing is captured"):
        captured(opt)


def test_graph_of_the_reference():
    opt, _ = warm(CASES[-1], "reference")
    with pytest.raises(RuntimeError, match="'reference' takes its numbers from Python"):
        captured(opt)


@each_backend
@each_case
def test_graph_released(case, backend):
    (opt, params), (twin, same) = warm(case, backend), warm(case, backend)
    graph = captured(opt)
    graph.replay()
    twin.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    del graph
    opt.release()
    assert torch.cuda.memory_allocated() < before
    for o in (opt, twin):
        o.step()
    captured(opt).replay()
    twin.step()
    assert same_bits(params, same)


@each_backend
@each_case
def test_graph_and_a_group_that_is_added(case, backend):
    (opt, params), (twin, same) = warm(case, backend), warm(case, backend)
    graph = captured(opt)
    for o, ps in ((opt, params), (twin, same)):
        ps.append(torch.nn.Parameter(torch.ones(40, 2, device="cuda")))
        ps[-1].grad = torch.full_like(ps[-1], 0.5)
        o.add_param_group({"params": ps[-1:]})
        o.step()
    assert same_bits(params, same)
    with pytest.raises(RuntimeError, match="param group 1 is new or has changed"):
        opt.refresh()
    graph.replay()  # without it
    same[-1].grad = None
    twin.step()
    assert same_bits(params, same)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_backend
@each_case
def test_several_devices(case, backend):
    engine = Engine(backend, "cuda")
    values = cases.random(SHAPES, seed=3)
    first, second = (
        [torch.nn.Parameter(v.to(f"cuda:{i}", torch.float32)) for v in values] for i in (0, 1)
    )
    both = engine.make(case, [*first, *second])
    apart = engine.params(values, torch.float32)
    alone = engine.make(case, apart)
    for seed in range(2):
        for params in (first, second, apart):
            set_grads(params, seed)
        both.step()
        alone.step()
    assert same_bits(first, apart) and same_bits(second, apart)
