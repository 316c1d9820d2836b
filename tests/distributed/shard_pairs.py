"""Tensors whole and in shards, side by side."""

import pytest
import torch
from ranks import everywhere_the_same, full
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

BACKENDS = ["reference", "cpu", "triton", "simt"]
#: processes are forked for each test, so that `make test` has the first of these alone
OTHERS = pytest.mark.full("shards on every engine")
ON_TWO = [BACKENDS[0], pytest.param(BACKENDS[1], marks=OTHERS)]
ON_EACH = [BACKENDS[0], *(pytest.param(name, marks=OTHERS) for name in BACKENDS[1:])]
S0, S1, R = Shard(0), Shard(1), Replicate()

#: name -> shape; nothing divides by 4, some have fewer rows than there are processes
SHAPES = {
    "a.weight": (7, 5),
    "a.bias": (7,),
    "b.weight": (3, 6),
    "b.bias": (3,),
    "c.scale": (1,),
    "d.kernel": (4, 3, 2),
}

#: mesh shape -> placements by number of dimensions of a tensor
PLACEMENTS = {
    "rows": ((2,), {1: [S0], 2: [S0], 3: [S0]}),
    "rows of 4": ((4,), {1: [S0], 2: [S0], 3: [S0]}),
    "columns": ((2,), {1: [R], 2: [S1], 3: [Shard(2)]}),
    "replicated": ((2,), {1: [R], 2: [R], 3: [R]}),
    "hsdp": ((2, 2), {1: [R, S0], 2: [R, S0], 3: [R, S1]}),
    "rows then columns": ((2, 2), {1: [S0, R], 2: [S0, S1], 3: [S0, S1]}),
    "rows within rows": (
        (2, 2),
        {1: [S0, S0], 2: [_StridedShard(0, split_factor=2), S0], 3: [S0, S0]},
    ),
    "some plain": ((2,), {1: None, 2: [S0], 3: None}),
}


def whole(seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    draw = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    return {name: x.to(device, dtype) for name, x in draw.items()}


def spread(x, mesh, placements):
    """A DTensor of what every process holds whole; None: as it is."""
    chosen, x = placements[x.dim()], x.clone()  # a replicated one would share its memory
    return x if chosen is None else distribute_tensor(x, mesh, chosen, src_data_rank=None)


def named(tensors):
    return [(name, torch.nn.Parameter(x.clone())) for name, x in tensors.items()]


def pair(mesh, placements, make, **options):
    """Parameters and optimizer, of whole tensors and of their shards."""
    ours = named(whole(**options))
    theirs = [(n, torch.nn.Parameter(spread(p.detach(), mesh, placements))) for n, p in ours]
    return (ours, make(ours)), (theirs, make(theirs))


def fill(ours, theirs, mesh, placements, step):
    grads = whole(1000 + step, ours[0][1].dtype, ours[0][1].device)
    for (name, p), (_, q) in zip(ours, theirs, strict=True):
        p.grad = grads[name]
        q.grad = spread(grads[name], mesh, placements)


def close(a, b, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(
        everywhere_the_same(full(a.detach())), b.detach(), rtol=rtol, atol=atol
    )


def same_stats(opt, before, sharded):
    """``before``: the whole optimizer's statistics a step ago, where sums come a step late."""
    stats, whole_stats = sharded.layer_stats(), opt.layer_stats()
    assert stats.pop("names") == whole_stats["names"]
    rule = opt.param_groups[0]["rule"]
    late = rule is None or rule.order == "gradient"
    for key, x in stats.items():
        expected = before[key] if late and key in ("ww", "uu", "wu") else whole_stats[key]
        if key == "angle":  # of parallel vectors it is the root of rounding errors
            if not late:
                torch.testing.assert_close(everywhere_the_same(x), expected, rtol=1e-9, atol=1e-7)
            continue
        torch.testing.assert_close(everywhere_the_same(x), expected, rtol=1e-9, atol=1e-12)
