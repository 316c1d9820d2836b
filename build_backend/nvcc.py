"""CUDA's compiler: whether the CUDA engine is built, by which nvcc, for which GPUs.

LAYERLR_CUDA: auto (the default) builds it where it can be used, that is, where torch has CUDA and
there is an nvcc in CUDA_HOME, CUDA_PATH, on the PATH or in /usr/local/cuda; 1 insists, whatever
torch has; 0 leaves it out. LAYERLR_CUDA_ARCH: what to compile for. By default the GPUs that torch
can use; where there is none (a container is built), "80;90;100;120". PTX serves the GPUs between
and after them. nvcc itself reads NVCC_CCBIN and NVCC_APPEND_FLAGS. cuda_library.py says what
LAYERLR_CUDA_LIBRARY is.
"""

import os
import re
import shlex
import shutil
import subprocess

from cuda_library import ROOT, stop

CUDA_ARCHITECTURES = "80;90;100;120"
#: the oldest that the kernels are written for
OLDEST = 80


def choose():
    """Return the nvcc that builds the CUDA engine and "", or None and why it is left out.

    None and "" where LAYERLR_CUDA_LIBRARY takes its place.
    """
    wanted = os.environ.get("LAYERLR_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        stop(f"LAYERLR_CUDA is auto, 0 or 1, not '{wanted}'.")
    given = os.environ.get("LAYERLR_CUDA_LIBRARY")
    if wanted == "0" and given:
        stop(f"LAYERLR_CUDA=0 leaves out what LAYERLR_CUDA_LIBRARY={given} names: unset one.")
    if wanted == "0" or given:
        return None, "" if given else "LAYERLR_CUDA=0"
    nvcc = find_nvcc()
    if wanted == "1":
        return nvcc or stop(
            "LAYERLR_CUDA=1 needs nvcc and found none: point CUDA_HOME at the CUDA toolkit."
        ), ""
    torch = torch_or_none()
    if torch is None or not torch.version.cuda:
        return None, f"torch {torch.__version__} has no CUDA" if torch else "no torch"
    if not nvcc:
        return None, "no nvcc in CUDA_HOME, CUDA_PATH, on the PATH or in /usr/local/cuda"
    there = present()
    if there and max(there) < OLDEST:
        return None, f"compute capability {max(there) / 10:.1f} of the GPU, 8.0 is needed"
    return nvcc, ""


def torch_or_none():
    """Return torch, or None where there is none: a source distribution needs none."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch


def find_nvcc():
    """Return CUDA's compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def says(nvcc, *options):
    """Return what nvcc prints."""
    return subprocess.run([nvcc, *options], stdout=subprocess.PIPE, text=True).stdout


def ahead(nvcc):
    """Return a warning where nvcc's CUDA is a major version ahead of torch's, else ""."""
    (release,) = re.findall(r"release (\d+)\.", says(nvcc, "--version")) or [None]
    torch = torch_or_none()
    of_torch = torch.version.cuda if torch else None
    if not (release and of_torch and int(release) > int(of_torch.split(".")[0])):
        return ""
    return (
        f"warning: {nvcc} is of CUDA {release}, torch of CUDA {of_torch}: the CUDA engine will "
        f"need a driver for CUDA {release}, torch does not. Else point CUDA_HOME at a toolkit of "
        f"CUDA {of_torch}, or set LAYERLR_CUDA=0."
    )


def present():
    """Return the architectures of the GPUs that torch can use: [80, 90]."""
    torch = torch_or_none()
    if torch is None or not torch.cuda.is_available():
        return []
    pairs = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return sorted({10 * major + minor for major, minor in pairs})


def architectures(nvcc):
    """Return the architectures to compile for, oldest first: '80', '90'."""
    known = re.findall(r"compute_(\d+)$", says(nvcc, "--list-gpu-arch"), flags=re.MULTILINE)
    asked = os.environ.get("LAYERLR_CUDA_ARCH")
    there = [a for a in present() if a >= OLDEST]
    if asked or not there:
        wanted = set(re.findall(r"[^;\s]+", asked or CUDA_ARCHITECTURES))
    else:  # an older nvcc compiles what runs on a newer GPU as PTX
        older = ([k for k in known if OLDEST <= int(k) <= a] for a in there)
        wanted = {max(choice, key=int) for choice in older if choice}
    found = sorted(wanted & set(known), key=int)
    # An older nvcc compiles the default for what it knows; what was asked for must be known.
    if not found or (asked and not wanted <= set(known)):
        names = asked or ";".join(map(str, there)) or CUDA_ARCHITECTURES
        stop(
            f"LAYERLR_CUDA_ARCH={names} cannot be compiled by {nvcc}, which knows "
            f"{', '.join(known) or 'none'}. LAYERLR_CUDA=0 leaves the CUDA engine out."
        )
    return found


def library_dirs(nvcc):
    """Return the folders that nvcc links from. Only nvcc knows: it may be a script in /usr/bin."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    trace = subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr
    (line,) = re.findall(r"^#\$ LIBRARIES=(.*)", trace, flags=re.MULTILINE) or [""]
    return [word.removeprefix("-L") for word in shlex.split(line)]


def flags(found, host_flags):
    """Return nvcc's options: a cubin for each architecture, and PTX.

    All are made from one virtual architecture, the oldest: the compiler's front end runs once. So
    no source may ask for __CUDA_ARCH__ (tests/gpu/test_cuda_build.py).
    """
    codes = ",".join([*(f"sm_{a}" for a in found), f"compute_{found[0]}"])
    return [
        *"-std=c++17 -O3 -fmad=false".split(),
        f"-Xcompiler={','.join(host_flags)}",
        # A loop that is never reached: what comes after `if (known) return` in a template.
        "-diag-suppress=128",
        # Registers and spills of every kernel, in a log beside the object; the tests read it.
        "-Xptxas=-v,--warn-on-spills",
        # nvcc writes the name of a temporary file into the object: now the same one every time.
        "--objdir-as-tempdir",
        f"-gencode=arch=compute_{found[0]},code=[{codes}]",
        f"-I{ROOT / 'csrc'}",
    ]
