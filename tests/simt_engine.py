"""Backend "simt": the CUDA engine's own sources, run on the CPU by the emulation in simt/."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from layerlr import _C
from layerlr.backends.cuda import CudaBackend

ROOT = Path(__file__).resolve().parent.parent
#: items of 1,024 elements rather than 4,096, so that small tensors have several
DEFINES = ["-DLAYERLR_SIMT", "-DLAYERLR_WORKERS=64"]
FLAGS = [
    *"-shared -fPIC -std=c++17 -O1 -ffp-contract=off -pthread -Wno-unknown-pragmas".split(),
    *DEFINES,
]


def unavailable() -> str | None:
    """Why the emulation cannot run here, or None."""
    if not (ROOT / "csrc/cuda").is_dir():
        return "needs the sources of the kernels"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulation is for x86-64 Linux"
    if shutil.which("c++") is None:
        return "needs a C++ compiler"
    return None


def layout() -> str:
    """What the build tells the library and layerlr._C of their headers."""
    file = ROOT / "build_backend/cuda_library.py"
    spec = importlib.util.spec_from_file_location("cuda_library_of_tests", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.layout()


def build() -> Path:
    """The library, compiled again when a source has changed."""
    folders = [ROOT / "csrc", ROOT / "tests/simt"]
    files = sorted(f for folder in folders for f in folder.rglob("*.*") if f.is_file())
    flags = [*FLAGS, f'-DLAYERLR_LAYOUT="{layout()}"', *(f"-I{folder}" for folder in folders)]
    key = hashlib.sha256(repr(flags).encode())
    for file in files:
        key.update(file.read_bytes())
    target = ROOT / "build/simt" / f"{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")  # others may be at it too
        sources = [ROOT / "tests/simt" / name for name in ("library.cpp", "simt.cpp")]
        subprocess.run(["c++", *flags, *sources, "-o", part], check=True)
        part.rename(target)
    return target


class SimtBackend(CudaBackend):
    """Kernels for a GPU, parameters in memory of the host."""

    name = "simt"
    device = "cpu"

    def missing(self, device) -> str | None:
        if device.type != self.device:
            return f"does not support parameters on {device}"
        return unavailable()

    @functools.cache  # noqa: B019 (one instance)
    def library(self):
        return _C.open_cuda_library(str(build()))

    @functools.cache  # noqa: B019
    def emulation(self):
        """Beside the engine: ``simt_capture(on)`` and ``simt_replay()``, its launches."""
        return ctypes.CDLL(str(build()))
