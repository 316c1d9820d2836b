"""Shards beside plain tensors, and layers that are spread in several ways."""

import pytest
import torch
from ranks import run
from shard_pairs import S0, R, close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import layerlr


def _beside_shards():
    mesh = init_device_mesh("cpu", (1,))
    values = torch.ones(4, 2), torch.ones(3)
    ours = [torch.nn.Parameter(v.clone()) for v in values]
    theirs = [distribute_tensor(values[0].clone(), mesh, [S0]), values[1].clone()]
    theirs = [torch.nn.Parameter(p) for p in theirs]
    opts = [layerlr.Adam(params, lr=0.1, rule="layca") for params in (ours, theirs)]
    for step in range(3):
        for params, opt in zip((ours, theirs), opts, strict=True):
            for p, v in zip(params, values, strict=True):
                g = v + step * torch.arange(v.numel()).reshape(v.shape)
                p.grad = distribute_tensor(g, mesh, [S0]) if isinstance(p, DTensor) else g
            if step == 1:
                opt.state[params[1]].clear()
            opt.step()
    for p, q in zip(ours, theirs, strict=True):
        close(q, p)
    assert opts[1].state[theirs[1]]["step"] == 2


def test_state_of_a_plain_tensor_beside_shards_is_looked_up():
    run(1, _beside_shards)


def _a_part_of_a_layer(rule):
    """Tensors that are spread in two ways make one layer, of which one has no gradient at times."""
    mesh = init_device_mesh("cpu", (2,))
    values = torch.ones(4, 2), torch.arange(6.0).reshape(3, 2)
    ours = [torch.nn.Parameter(v.clone()) for v in values]
    theirs = [distribute_tensor(v.clone(), mesh, [s]) for v, s in zip(values, (S0, R), strict=True)]
    theirs = [torch.nn.Parameter(p) for p in theirs]
    opts = [
        layerlr.SGD(params, lr=0.1, rule=rule, layers=lambda name, p: 0)
        for params in (ours, theirs)
    ]
    for step, lacking in enumerate((None, 0, 1, None)):
        for params, opt in zip((ours, theirs), opts, strict=True):
            for k, (p, v) in enumerate(zip(params, values, strict=True)):
                g = v + step * torch.arange(v.numel()).reshape(v.shape)
                g = distribute_tensor(g, mesh, p.placements) if isinstance(p, DTensor) else g
                p.grad = None if k == lacking else g
            opt.step()
        for p, q in zip(ours, theirs, strict=True):
            close(q, p)


@pytest.mark.parametrize("rule", ["layca", "hyperball", "lars", "lamb"])
def test_a_part_of_a_layer_has_no_radius(rule):
    run(2, _a_part_of_a_layer, rule)
