"""What is installed and which engine steps what: ``python -m layerlr``."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence

import torch

import layerlr

from . import _C, devices
from .backends import BACKENDS, cuda
from .selfcheck import engines, selfcheck


def versions() -> str:
    """Of all that an engine depends on."""
    words = {
        "layerlr": layerlr.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "its CUDA": torch.version.cuda or torch.version.hip or "none",
        "triton": version_of("triton"),
    }
    return ", ".join(f"{name} {version}" for name, version in words.items())


def version_of(module: str) -> str:
    """Of a module that may be missing, or break when it is imported."""
    if importlib.util.find_spec(module) is None:
        return "none"
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:
        return f"cannot be imported ({type(error).__name__}: {error})"


def gpus() -> str:
    """GPUs that torch can use, and the driver, which may be there without."""
    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"cuda:{index} {name}, compute capability {major}.{minor}")
    return f"GPU: {'; '.join(names) or 'none that torch can use'}. Driver: {driver()}."


def driver() -> str:
    """The newest CUDA that NVIDIA's driver runs."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "none"
    return f"of CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def automatic(device: torch.device) -> str:
    """The backend that ``backend="auto"`` takes for float32 parameters, or why there is none."""
    if reason := devices.absent(device):
        return f"none, {reason}"
    return next(name for name, backend in BACKENDS.items() if backend.missing(device) is None)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m layerlr", description=__doc__)
    p.add_argument("--no-check", action="store_true", help="take no steps, only say what is there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Print it; 1 where an engine does not take the reference's steps."""
    args = parser().parse_args(argv)
    print(versions())
    print(gpus())
    print(f"CPU engine: {_C.instruction_set()}. The CUDA engine {kernels()}.")
    for place in ("cpu", "cuda"):
        print(f'backend="auto" for parameters on {place}: {automatic(torch.device(place))}')
    if args.no_check:
        for backend, where, reason in engines(None):
            if where is None:
                print(f"{backend} missing: {reason}")
        return 0
    return 0 if all(finding.good for finding in selfcheck()) else 1


def kernels() -> str:
    """What the CUDA engine was built for."""
    if reason := cuda.left_out():
        return reason
    found = [f"{int(a) // 10}.{int(a) % 10}" for a in cuda.load().architectures]
    return (
        f"was built for compute capability {', '.join(found)}, and as PTX for those from {found[0]}"
    )


if __name__ == "__main__":
    sys.exit(main())
