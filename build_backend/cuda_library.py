"""The library of the CUDA engine: its layout, and one that is there already.

LAYERLR_CUDA_LIBRARY: the path of a library that another build of these sources has made, which is
copied in place of compiling one. Neither Python nor torch is in it, so one serves all of them.
"""

import ctypes
import hashlib
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stop(message):
    """End the build with one sentence instead of a traceback."""
    raise SystemExit(f"layerlr: {message}")


def includes(name):
    """Return the files of csrc/ that one of them includes, by way of others too."""
    found, todo = set(), [name]
    while todo:
        text = (ROOT / "csrc" / todo.pop()).read_text()
        names = set(re.findall(r'^#include "(.+?)"', text, flags=re.MULTILINE)) - found
        todo += [name for name in names if (ROOT / "csrc" / name).is_file()]
        found |= set(todo)
    return found


def layout():
    """Return what layerlr._C and the library must agree on: '0.1.0-0123456789ab'.

    The release, and a hash of the headers that both include, for the structs that they exchange are
    declared there.
    """
    (version,) = re.findall(
        r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    found = hashlib.sha256()
    for name in sorted(includes("device_plan.cpp") & includes("cuda/engine.cu")):
        found.update((ROOT / "csrc" / name).read_bytes())
    return f"{version}-{found.hexdigest()[:12]}"


def given():
    """Return the file that LAYERLR_CUDA_LIBRARY names, or None; stop where it does not fit."""
    path = os.environ.get("LAYERLR_CUDA_LIBRARY")
    if not path:
        return None
    file = Path(path).resolve()
    if not file.is_file():
        stop(f"LAYERLR_CUDA_LIBRARY={path} is no file.")
    try:
        library = ctypes.CDLL(str(file)).layerlr_cuda_library
    except (OSError, AttributeError) as error:
        stop(f"LAYERLR_CUDA_LIBRARY={path} is no library of layerlr's kernels: {error}.")
    library.restype = ctypes.POINTER(ctypes.c_char_p)  # the first entry of the struct
    its = library()[0].decode()
    if its != layout():
        stop(
            f"LAYERLR_CUDA_LIBRARY={path} is of layerlr {its}, these sources are of {layout()}: "
            "name a library that was compiled from them."
        )
    return file
