"""Which GPUs the CUDA engine takes, and what is said where an engine is missing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from torch.nn import Parameter

import layerlr
from layerlr import _C
from layerlr import __main__ as command
from layerlr.backends import HELP, PlanSpec, choose
from layerlr.backends.cuda import CudaBackend, refusal


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes a GPU, of a capability, beside kernels of some architectures."""
    module = types.ModuleType("layerlr._cuda")
    module.__spec__ = importlib.machinery.ModuleSpec("layerlr._cuda", None)
    asked = []

    def make(capability, architectures, error=None):
        def device_info(index):
            asked.append(index)
            if error:
                raise RuntimeError(error)
            return {"multiprocessors": 1}

        module.architectures, module.device_info = architectures, device_info
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        return asked

    monkeypatch.setitem(sys.modules, "layerlr._cuda", module)
    monkeypatch.setattr(layerlr, "_cuda", module, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    refusal.cache_clear()
    yield make
    refusal.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "architectures", "words"),
    [
        ((8, 0), ["80", "90", "100"], None),
        ((8, 9), ["80", "90", "100"], None),  # the cubin of 8.0
        ((12, 0), ["80", "90", "100"], None),  # PTX
        ((10, 3), ["90"], None),
        ((7, 5), ["80", "90"], "was built for compute capability 8.0 and above, cuda:0 has 7.5"),
        ((8, 6), ["90"], "9.0 and above, cuda:0 has 8.6: install it with LAYERLR_CUDA_ARCH=86"),
        ((9, 0), ["100"], "10.0 and above, cuda:0 has 9.0: install it with LAYERLR_CUDA_ARCH=90"),
    ],
)
def test_capability(gpu, capability, architectures, words):
    gpu(capability, architectures)
    reason = CudaBackend().missing(GPU)
    assert reason is None if words is None else reason.endswith(words), reason


def test_an_old_driver(gpu):
    """Auto goes to Triton; who asked for CUDA is told why, and the device is asked once."""
    pytest.importorskip("triton")
    asked = gpu((9, 0), ["80", "90"], "CUDA driver version is insufficient")
    table = types.SimpleNamespace(device=GPU, params=[], names=[])
    direction = types.SimpleNamespace(name="sgd")
    spec = PlanSpec(table, direction, None, [], torch.zeros(0), False, None)
    assert choose("auto", spec).name == "triton"
    with pytest.raises(RuntimeError) as refused:
        choose("cuda", spec)
    reason = "cannot use cuda:0: CUDA driver version is insufficient"
    assert f"backend 'cuda' {reason}; use backend='triton' or" in str(refused.value)
    assert str(refused.value).endswith("; python -m layerlr says what runs here")
    assert asked == [0]
    assert CudaBackend().missing(torch.device("cuda", 1)).startswith("cannot use cuda:1: ")
    assert asked == [0, 1]


def test_an_engine_that_was_not_built(monkeypatch):
    """The reason is the build's; python -m layerlr says it too."""
    monkeypatch.setitem(sys.modules, "layerlr._cuda", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for reason in ("torch 2.13.0 has no CUDA", "no nvcc"):
        monkeypatch.setattr(_C, "NO_CUDA", reason)
        assert CudaBackend().missing(GPU) == f"was not built: {reason}"
        assert command.kernels() == f"not built ({reason})"


def test_messages_that_name_an_engine_say_where_to_look():
    for backend, error in (("gpu", ValueError), ("cuda", RuntimeError)):
        with pytest.raises(error, match=f"{HELP}$"):
            layerlr.SGD([Parameter(torch.ones(2))], backend=backend)
