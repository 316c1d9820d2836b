"""What a step allocates, and tensors beyond 32-bit indices."""

import os
import resource

import pytest
import torch

import layerlr


def free_bytes():
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "cls, kwargs",
    [
        (layerlr.SGD, dict(momentum=0.9, rule="singh")),
        (layerlr.SGD, dict(momentum=0.9, rule="layca")),
        (layerlr.AdamW, dict(rule="lamb")),
    ],
)
def test_a_step_allocates_nothing_of_a_parameters_size(cls, kwargs):
    p = torch.nn.Parameter(torch.randn(4096, 4096))  # 64 MiB
    p.grad = torch.randn_like(p)
    opt = cls([p], lr=1e-3, backend="cpu", **kwargs)
    opt.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            opt.step()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 16 * 1024  # KiB: a quarter of the parameter
    allocated = [e.self_cpu_memory_usage for e in profile.key_averages()]
    assert max(allocated, default=0) < 1 << 20


@pytest.mark.skipif(free_bytes() < 16 << 30, reason="needs 16 GiB of free memory")
def test_more_elements_than_an_int_counts():
    n = 2**31 + 37
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    p.grad = torch.zeros(n, dtype=torch.bfloat16)
    ends = [0, 1, 2**31 - 1, 2**31, 2**31 + 16, n - 1]
    p.grad[ends] = 1.0
    opt = layerlr.SGD([p], lr=0.25, rule="singh", backend="cpu")
    opt.step()
    stats = opt.layer_stats()
    assert stats["gg"].item() == len(ends)
    assert stats["ww"].item() == n
    assert torch.equal(p[ends], torch.full((len(ends),), p[0].item(), dtype=torch.bfloat16))
    assert p[0] < 1
    assert torch.count_nonzero(p.detach() != 1).item() == len(ends)
