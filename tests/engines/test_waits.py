"""What a step asks of a GPU while it runs: nothing is copied there from the host's memory.

Such a copy waits for all that was launched before, and a CUDA graph cannot hold it. No GPU is
needed: tensors are fake ones of torch's, whose operations are listed. What this torch cannot fake
without CUDA (an index) is asked on a GPU (tests/gpu/test_cuda_runtime.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerlr import devices, stepping
from layerlr.backends import StepConfig
from layerlr.layer_table import LayerTable, Span

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Copies(TorchDispatchMode):
    """Operations that had tensors of the host and gave some on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))

        def on(values):
            return {x.device.type for x in tree_leaves(values) if isinstance(x, torch.Tensor)}

        if "cpu" in on((args, kwargs)) and "cuda" in on(answer):
            self.found.append(str(function))
        return answer


def copies(run):
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as mode:
        run()
    return mode.found


def clip():
    plans = []
    for _ in range(2):
        squares = torch.zeros(5, dtype=torch.float64, device=GPU)
        spec = SimpleNamespace(table=SimpleNamespace(device=GPU))
        plan = SimpleNamespace(spec=spec, norms=lambda config, x=squares: x)
        plans.append((plan, StepConfig()))
    stepping.clip(plans, {0: 1.0, 1: 1.0})


def test_copies_are_found():
    assert copies(lambda: torch.as_tensor(1.0, device=GPU)) == ["aten._to_copy.default"]


def test_max_grad_norm_waits_for_nothing():
    assert copies(clip) == []


def test_split_tensors_wait_for_nothing():
    """On meta, where a number cannot be read back."""
    p = torch.zeros(6, 2, device="meta")
    table = LayerTable([p], ["p"], [Span(0, 0, 2, 1), Span(0, 2, 6, 0)], ["a", "b"], [], [], [])
    assert table.spread(0, torch.zeros(2, device="meta"), p).shape == (6, 1)


def test_numbers_of_the_host():
    assert devices.scalar(torch.tensor(0.25), CPU) == devices.scalar(0.25, CPU) == 0.25
    found = devices.numbers([1, 2], torch.float64, CPU)
    assert found.tolist() == [1.0, 2.0] and found.dtype == torch.float64
