"""Which GPUs the CUDA engine takes, and what is said where an engine is missing."""

from __future__ import annotations

import shutil
import subprocess
import types

import pytest
import torch
from torch.nn import Parameter

import layerlr
from layerlr import _C
from layerlr import __main__ as command
from layerlr.backends import HELP, PlanSpec, choose, cuda
from layerlr.backends.cuda import CudaBackend, refusal


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes a GPU, of a capability, beside kernels of some architectures."""
    library = types.SimpleNamespace()
    asked = []

    def make(capability, architectures, error=None):
        def device_info(index):
            asked.append(index)
            if error:
                raise RuntimeError(error)
            return {"multiprocessors": 1}

        library.architectures, library.device_info = architectures, device_info
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        return asked

    monkeypatch.setattr(_C, "NO_CUDA", "")
    monkeypatch.setattr(cuda, "load", lambda: library)
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
    pytest.importorskip("triton", reason="Triton is not installed")
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
    for reason in ("torch 2.13.0 has no CUDA", "no nvcc"):
        monkeypatch.setattr(_C, "NO_CUDA", reason)
        assert CudaBackend().missing(GPU) == f"was not built: {reason}"
        assert command.kernels() == f"was not built: {reason}"


#: a library like that of the kernels, of another release
STRANGER = """
static const struct { const char* layout; } library = {"0.0.1-0123456789ab"};
const void* layerlr_cuda_library(void) { return &library; }
"""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "cannot open shared object file: No such file or directory"),
        ("no source of C", "file too short"),
        ("int nothing;", "is no library of layerlr's kernels"),
        (STRANGER, "is of layerlr 0.0.1-0123456789ab, layerlr._C is of "),
    ],
    ids=["gone", "broken", "strange", "of another release"],
)
def test_a_library_that_does_not_fit(monkeypatch, tmp_path, source, words):
    """It is named, with what is wrong with it and the remedy."""
    file = tmp_path / "liblayerlr_cuda.so"
    if source == "no source of C":
        file.write_text("")
    elif source:
        compiler = shutil.which("cc") or pytest.skip(reason="needs a C compiler")
        (tmp_path / "library.c").write_text(source)
        subprocess.run([compiler, "-shared", tmp_path / "library.c", "-o", file], check=True)
    monkeypatch.setattr(_C, "NO_CUDA", "")
    monkeypatch.setattr(cuda, "LIBRARY", file)
    cuda.load.cache_clear()
    reason = CudaBackend().missing(GPU)
    assert reason.startswith(f"cannot be loaded: {file}") and words in reason
    assert reason.endswith("; install layerlr again")
    assert command.kernels() == reason


def test_messages_that_name_an_engine_say_where_to_look():
    for backend, error in (("gpu", ValueError), ("cuda", RuntimeError)):
        with pytest.raises(error, match=f"{HELP}$"):
            layerlr.SGD([Parameter(torch.ones(2))], backend=backend)
