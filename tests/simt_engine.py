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
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths

from layerlr.backends.cuda import CudaBackend

_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

ROOT = Path(__file__).resolve().parent.parent
#: items of 1,024 elements rather than 4,096, so that small tensors have several
DEFINES = [
    "-DLAYERLR_SIMT",
    "-DLAYERLR_WORKERS=64",
    '-DLAYERLR_CUDA_ARCH="simt"',
]
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


def build() -> Path:
    """The module, compiled again when a source has changed."""
    folders = [ROOT / "csrc", ROOT / "tests/simt"]
    files = sorted(f for folder in folders for f in folder.rglob("*.*") if f.is_file())
    key = hashlib.sha256(repr(FLAGS).encode())
    for file in files:
        key.update(file.read_bytes())
    target = ROOT / "build/simt" / f"_cuda-{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")  # others may be at it too
        system = [*include_paths(), sysconfig.get_paths()["include"]]
        command = [
            "c++",
            *FLAGS,
            *(f"-I{folder}" for folder in folders),
            *(word for folder in system for word in ("-isystem", folder)),
            *(str(ROOT / "tests/simt" / name) for name in ("module.cpp", "simt.cpp")),
            *("-o", str(part)),
        ]
        subprocess.run(command, check=True)
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
    def module(self):
        spec = importlib.util.spec_from_file_location("_cuda", build())
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @functools.cache  # noqa: B019
    def library(self):
        """Beside the engine: ``simt_capture(on)`` and ``simt_replay()``, its launches."""
        return ctypes.CDLL(self.module().__file__)

    def engine(self):
        address = ctypes.addressof(ctypes.c_char.in_dll(self.library(), "simt_engine"))
        return _capsule(address, b"layerlr.Engine", None)
