"""Processes that talk to each other, for tests of sharding."""

import copy
import os
import tempfile
import time

import torch
import torch._dynamo  # DTensor does, 0.9 s of CPU in each process: here it is before the fork
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

#: seconds that no test takes, however busy the machine
PATIENCE = 240


def _main(rank, body, world, folder, device, args):
    os.environ["RANK"], os.environ["LOCAL_RANK"] = str(rank), str(rank)
    torch.set_num_threads(1)
    backend, gpus = "gloo", torch.cuda.device_count() if device == "cuda" else 0
    if gpus:  # gloo where several processes share one: NCCL does not
        torch.cuda.set_device(rank % gpus)
        backend = "nccl" if gpus >= world else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    try:
        body(*args)
    finally:
        dist.destroy_process_group()


def run(world, body, *args, device="cpu"):
    """Run ``body(*args)`` in ``world`` processes; an exception in one of them is raised here."""
    start = "spawn" if torch.cuda.is_available() else "fork"  # a fork could not use the GPU
    with tempfile.TemporaryDirectory() as folder:
        args = (body, world, folder, device, args)
        ranks = mp.start_processes(_main, args, world, join=False, start_method=start)
        deadline = time.monotonic() + PATIENCE
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                for process in ranks.processes:
                    process.kill()
                raise AssertionError(f"{body.__name__} hangs")


def everywhere_the_same(x):
    """Assert that all processes hold the same bits; returns x."""
    all_of_them = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, x.contiguous())
    assert all(torch.equal(x, y) for y in all_of_them)
    return x


def full(x):
    """The whole of a tensor, which may be a DTensor."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class Toy(torch.nn.Module):
    """A few layers of awkward sizes: nothing divides by 2 or 4, a vector of one element."""

    def __init__(self, hidden=11):
        super().__init__()
        self.up = torch.nn.Linear(7, hidden)
        self.mid = torch.nn.Linear(hidden, 3, bias=False)
        self.norm = torch.nn.LayerNorm(3)
        self.out = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.norm(self.mid(torch.tanh(self.up(x)))))


def models(hidden=11):
    """The same model twice, in float64: what differs is not the order of sums in its gradients."""
    torch.manual_seed(0)
    model = Toy(hidden).double()
    return model, copy.deepcopy(model)


def fsdp(model, mesh=None, **options):
    for part in (model.up, model.mid, model.out, model):
        fully_shard(part, mesh=mesh, **options)
    return model


def tensor_parallel(model, mesh):
    plan = {"up": ColwiseParallel(), "mid": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def equal(model, whole, rtol=1e-9, atol=1e-12):
    for (_, p), (_, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        everywhere = everywhere_the_same(full(p.detach()))
        torch.testing.assert_close(everywhere, q.detach(), rtol=rtol, atol=atol)


def batch(step, rank=None, n=8):
    """Inputs and targets of a step; with a rank, its part of them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    if rank is None:
        return x, y
    size = n // dist.get_world_size()
    return x[rank * size :][:size], y[rank * size :][:size]


def train(model, opt, steps, rank=None, first=0):
    """Some steps of mean-square regression."""
    for step in range(first, first + steps):
        x, y = batch(step, rank)
        opt.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        opt.step()
