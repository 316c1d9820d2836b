"""What the compiled kernels are made of: the instructions in the CUDA library, kernel by kernel.

To disassemble one architecture takes ten seconds. What is found is kept in ``build/sass``, for all
processes of a run and for the next run on the same library.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import proofs

from layerlr.backends.cuda import LIBRARY

TOOLKITS = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
FOLDER = proofs.ROOT / "build/sass"


def find(program, *folders):
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


NVCC = find("nvcc", *(Path(home, "bin") for home in TOOLKITS if home))


def cuobjdump() -> str | None:
    """The disassembler, of the CUDA toolkit or of Triton."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    return find("cuobjdump", *folders, *([Path(NVCC).parent] if NVCC else []))


class Key(NamedTuple):
    """A kernel; a step's by what it is instantiated for."""

    arch: str
    kernel: str
    direction: str = ""
    family: str = ""

    @property
    def name(self):
        return "-".join(part for part in self[1:] if part)


FAMILIES = {
    "NS_6FloatsILb0EEE": "plain",
    "NS_6FloatsILb1EEE": "coded",
    "NS_8AnyDtypeE": "any",
}


def key_of(arch, mangled):
    """The key of a kernel's name in the object file."""
    kernel = re.search(r"([a-z]+)_kernel(?=[IE])", mangled)[1]
    direction = re.search(r"_kernelINS_(\d+)(\w+)", mangled)
    if not direction:
        return Key(arch, kernel)
    length, rest = int(direction[1]), direction[2]
    family = [name for code, name in FAMILIES.items() if code in rest]
    return Key(arch, kernel, rest[:length], *family)


class Instruction(NamedTuple):
    address: int
    name: str
    to: int | None  # where a branch or a call goes


def disassembled(arch: str) -> Iterator[str]:
    """Of each kernel a line with its name, then a line "address name target" an instruction."""
    instruction = re.compile(
        r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)(?:.*\b0x([0-9a-f]+) ;)?"
    )
    command = [cuobjdump(), "--dump-sass", "-arch", f"sm_{arch}", LIBRARY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := instruction.match(line):
                address, name, target = found.groups()
                jumps = name[:4] in ("BRA", "BRA.", "CALL")
                yield f"{address} {name} {target if target and jumps else ''}\n"
            elif "Function : " in line:
                yield f"\n{line.split()[-1]}\n"
    assert process.returncode == 0


def kept(arch: str, *, wait: bool) -> Path | None:
    """The file with an architecture's kernels, made if need be; None where another makes it now."""
    file = FOLDER / f"sm_{arch}.txt"
    made_of = proofs.digest(LIBRARY, Path(__file__), cuobjdump())
    FOLDER.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        if not file.exists() or not file.read_text().startswith(f"{made_of}\n"):
            part = file.with_suffix(".part")
            with part.open("w") as out:
                out.write(f"{made_of}\n")
                out.writelines(disassembled(arch))
            part.rename(file)
    return file


@functools.lru_cache(maxsize=4)
def instructions(code: str) -> list[Instruction]:
    rows = (line.split(" ") for line in code.splitlines())
    return [Instruction(int(at, 16), name, int(to, 16) if to else None) for at, name, to in rows]


class Listings(Mapping[Key, list[Instruction]]):
    """The instructions of each kernel."""

    def __init__(self, architectures):
        for arch in architectures:  # first what no other process is at
            kept(arch, wait=False)
        self.text = {}
        for arch in architectures:
            for kernel in kept(arch, wait=True).read_text().split("\n\n")[1:]:
                mangled, _, code = kernel.partition("\n")
                self.text[key_of(arch, mangled)] = code

    def __getitem__(self, key):
        return instructions(self.text[key])

    def __iter__(self):
        return iter(self.text)

    def __len__(self):
        return len(self.text)
