"""Sharded parameters: DTensors of any placement step as the whole tensors do, with one message."""

import pytest
import torch
from ranks import everywhere_the_same, run
from shard_pairs import (
    BACKENDS,
    OTHERS,
    PLACEMENTS,
    S0,
    S1,
    R,
    close,
    fill,
    pair,
    same_stats,
    spread,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import layerlr
from layerlr import rules

RULES = [None, "singh", "lars", "layca", "lamb", rules.Layca(radius="current")]


MAKE = {
    "momentum": lambda p, **k: layerlr.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **k),
    "adamw": lambda p, **k: layerlr.AdamW(p, lr=0.1, weight_decay=0.1, **k),
}


def _as_whole(name, backend, steps):
    shape, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", shape)
    for make in MAKE.values():
        for rule in RULES:
            for layers in ("tensor", "module"):
                options = {"rule": rule, "layers": layers, "adapt": "all", "backend": backend}
                (ours, opt), (theirs, sharded) = pair(
                    mesh, placements, lambda p, o=options, m=make: m(p, **o)
                )
                for step in range(steps):
                    fill(ours, theirs, mesh, placements, step)
                    before = opt.layer_stats()
                    opt.step()
                    sharded.step()
                for (_, p), (_, q) in zip(ours, theirs, strict=True):
                    close(q, p, 1e-9, 1e-12)
                    for key, x in sharded.state[q].items():
                        per_element = x.shape == q.shape and key != "radius"
                        assert isinstance(x, DTensor) == (isinstance(q, DTensor) and per_element)
                        if per_element:
                            close(x, opt.state[p][key], 1e-9, 1e-12)
                same_stats(opt, before, sharded)


#: what `make test` has: dimension 0, two dimensions of a mesh, parameters that are no DTensors
FEW = ("rows", "rows then columns", "some plain")
REST = pytest.mark.full("other placements of shards")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else REST) for n in PLACEMENTS]
)
def test_steps_as_whole_tensors_do(name):
    shape, _ = PLACEMENTS[name]
    run(torch.Size(shape).numel(), _as_whole, name, "reference", 4)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("rows of 4", "cpu"),
        *(pytest.param("rows then columns", backend, marks=OTHERS) for backend in BACKENDS[1:]),
    ],
)
def test_engines(name, backend):
    run(4, _as_whole, name, backend, 3 if backend in ("triton", "simt") else 5)


def _parts(backend, device):
    """Part by part, without messages of the test's own: gloo cannot gather on a GPU."""
    shape, placements = PLACEMENTS["rows"]
    mesh = init_device_mesh(device, shape)
    for rule in ("singh", "layca", "lamb", None):
        options = {"rule": rule, "adapt": "all", "backend": backend, "max_grad_norm": 1.0}
        (ours, opt), (theirs, sharded) = pair(
            mesh, placements, lambda p, o=options: MAKE["adamw"](p, **o), device=device
        )
        for step in range(4):
            fill(ours, theirs, mesh, placements, step)
            opt.step()
            sharded.step()
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            mine = spread(p.detach(), mesh, placements)._local_tensor
            torch.testing.assert_close(q.detach()._local_tensor, mine, rtol=1e-9, atol=1e-12)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize(
    ("backend", "device"),
    [("cpu", "cpu")]
    + [pytest.param(b, "cuda", marks=GPU) for b in ("cuda", "triton", "reference")],
)
def test_parts(backend, device):
    run(2, _parts, backend, device, device=device)


def ones(mesh, placements):
    """A tensor that all processes know: none has to send it."""
    return distribute_tensor(torch.ones(5, 3), mesh, placements, src_data_rank=None)


def _messages(backend):
    mesh = init_device_mesh("cpu", (2, 2))
    for n in (1, 60, 300):
        for placements, groups in (([S0], 1), ([R, S0], 1), ([S0, S1], 2)):
            on = mesh if len(placements) == 2 else init_device_mesh("cpu", (4,))
            params = [torch.nn.Parameter(ones(on, placements)) for _ in range(n)]
            for rule in ("singh", "layca"):
                half = n // 2
                opt = layerlr.SGD(
                    [{"params": params[:half]}, {"params": params[half:], "lr": 0.2}][half == 0 :],
                    lr=0.1,
                    momentum=0.9,
                    rule=rule,
                    backend=backend,
                )
                for p in params:
                    p.grad = ones(on, placements)
                for limit, messages in ((None, groups), (1.0, 2 * groups)):
                    opt.param_groups[-1]["max_grad_norm"] = limit
                    with CommDebugMode() as seen:
                        opt.step()
                    assert seen.get_total_counts() == messages, (n, placements, rule, limit)
    plain = layerlr.SGD(params, lr=0.1, backend=backend)
    with CommDebugMode() as seen:
        plain.step()
    assert seen.get_total_counts() == 0


def test_one_message_for_each_process_group():
    run(4, _messages, "cpu")


def _clipped(name, backend):
    shape, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", shape)
    for rule in (None, "lars", "lamb"):
        (ours, opt), (theirs, sharded) = pair(
            mesh,
            placements,
            lambda p, r=rule: layerlr.SGD(
                p, lr=0.1, momentum=0.9, rule=r, layers="module", max_grad_norm=0.5, backend=backend
            ),
        )
        for step in range(3):
            fill(ours, theirs, mesh, placements, step)
            opt.step()
            sharded.step()
            torch.testing.assert_close(everywhere_the_same(sharded.grad_norm), opt.grad_norm)
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            close(q, p, 1e-9)


@pytest.mark.parametrize("name", ["rows", "rows then columns", "some plain"])
def test_max_grad_norm_is_that_of_whole_gradients(name):
    shape, _ = PLACEMENTS[name]
    run(torch.Size(shape).numel(), _clipped, name, "reference")


def _split(name, backend):
    shape, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", shape)
    for split in ([2, 1, 4], [3, 3, 1], 7):

        def make(params, split=split):
            weights = [p for n, p in params if n == "a.weight"]
            return layerlr.SGD(
                [{"params": weights, "split": split}], lr=0.1, rule="layca", backend=backend
            )

        (ours, opt), (theirs, sharded) = pair(mesh, placements, make)
        for step in range(5):
            fill(ours, theirs, mesh, placements, step)
            opt.step()
            sharded.step()
        (p,), (q,) = opt.state, sharded.state
        close(q, p)
        close(sharded.state[q]["radius"], opt.state[p]["radius"])
        same_stats(opt, None, sharded)


SPLIT = ("rows of 4", "columns", "rows within rows", "hsdp")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "reference") for name in SPLIT),
        *(pytest.param(name, "cpu", marks=OTHERS) for name in SPLIT),
        *(pytest.param("rows of 4", backend, marks=OTHERS) for backend in BACKENDS[2:]),
    ],
)
def test_layers_split_over_dim_0(name, backend):
    shape, _ = PLACEMENTS[name]
    run(torch.Size(shape).numel(), _split, name, backend)
