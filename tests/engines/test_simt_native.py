"""The CUDA engine's kernels, run on the CPU, under sanitizers; and what a mistake in them shows."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import proofs
import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *"-std=c++17 -O1 -g1 -ffp-contract=off -fno-math-errno -pthread -Wno-psabi".split(),
    *"-Wno-unknown-pragmas -DLAYERLR_SIMT -Icsrc -Itests/simt".split(),
    *"-DLAYERLR_WORKERS=32 -DLAYERLR_SEGMENT_ITEMS=4".split(),  # small blocks, many segments
]
#: one state and the gradient in the second pass, three and not; a mutant is compiled with one
DIRECTIONS = ["-DLAYERLR_DIRECTIONS(X)=X(Nesterov) X(AmsGrad)"]
FEWER = ["-DLAYERLR_DIRECTIONS(X)=X(Nesterov)"]
KERNELS, SCHEDULE = "csrc/cuda/engine.cu", "csrc/cuda/schedule.cpp"
DRIVER = [KERNELS, SCHEDULE, "tests/native/cuda_driver.cpp", "tests/simt/simt.cpp"]
CPU_ENGINE = ["csrc/plan.cpp"]
CPU_ENGINE += [f"csrc/cpu/{name}.cpp" for name in ("engine", "dispatch", "kernels_default")]

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="the emulation switches stacks on x86-64 Linux only",
    ),
]


class Mutant(NamedTuple):
    """A mistake in a source, what it shows, and in which cases of the driver."""

    id: str
    file: str
    seen: str
    cases: str  # every-from
    old: str
    new: str


#: what is seen -> the sanitizer that sees it, what that says; without one, what the driver says
SEEN = {
    "race": ("thread", "data race|simt: DEADLOCK"),  # whose threads may part before they collide
    "overflow": ("address", "AddressSanitizer: heap-"),  # what lies beyond may be freed memory
    "misaligned": (None, "simt: a misaligned access"),
    "null": ("undefined", "null pointer"),
    "wrong": (None, "WRONG"),
    "hang": (None, "simt: DEADLOCK"),
}


def read_mutants():
    for block in (ROOT / "tests/native/mutants.txt").read_text().split("\n\n")[1:]:
        head, *lines = block.splitlines()
        name, file, seen, cases = [*head.split(), "13-0"][:4]
        sides = ("\n".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")
        yield Mutant(name, file, seen, cases, *sides)


def sanitize(tool):
    return [f"-fsanitize={tool}", "-fno-sanitize-recover=all"] if tool else []


def compile(source, folder, tool, directions, *flags):
    """The object; where another process may compile the same, there is one when it is whole."""
    target = folder / f"{Path(source).name}-{tool}-{proofs.digest(directions)}.o"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        flags = [*flags, *FLAGS, *sanitize(tool), *directions]
        command = ["c++", *flags, "-x", "c++", "-c", source, "-o", part]
        subprocess.run(command, cwd=ROOT, check=True)
        part.rename(target)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Objects of the driver by source, compiled when first asked for; the CPU engine's as it is."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def build(tool, directions, leave_out=()):
        tools = dict.fromkeys(DRIVER, tool) | dict.fromkeys(CPU_ENGINE)
        return [compile(s, folder, tools[s], directions) for s in tools if s not in leave_out]

    return build


def run(folder, tool, objects, cases):
    """Link the driver, and run its cases."""
    program = folder / "driver"
    command = ["c++", *sanitize(tool), "-pthread", *objects, "-o", program]
    subprocess.run(command, check=True)
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"}
    return subprocess.run(
        [program, *cases.split("-")], env=env, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    ("tool", "cases"), [(None, "1-0"), ("address,undefined", "7-0"), ("thread", "11-0")]
)
def test_sanitizers(tool, cases, objects, tmp_path, proof):
    """Schedules change no bit; the CPU engine agrees; nothing is out of bounds or unordered."""
    if proof(tool, cases, DIRECTIONS, proofs.compiled(FLAGS, *DRIVER, *CPU_ENGINE)):
        return
    done = run(tmp_path, tool, objects(tool, DIRECTIONS), cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.id) for m in read_mutants()])
def test_catches(mutant, objects, tmp_path, proof):
    """The changed source lies in front of the others, which are where they always are."""
    if proof(mutant, SEEN[mutant.seen], FEWER, proofs.compiled(FLAGS, *DRIVER, *CPU_ENGINE)):
        return
    home = ROOT / "csrc" if "/" in mutant.file else ROOT / "tests/simt"
    text = (home / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    changed = tmp_path / mutant.file
    changed.parent.mkdir(exist_ok=True)
    changed.write_text(text.replace(mutant.old, mutant.new))

    tool, report = SEEN[mutant.seen]
    sources = {KERNELS: KERNELS}  # what includes it
    if mutant.file.endswith("tables.h"):
        sources = {source: source for source in DRIVER[:3]}
    elif changed.suffix in (".cpp", ".cu"):
        sources = {f"csrc/{mutant.file}": changed}
    mine = [compile(s, tmp_path, tool, FEWER, f"-I{tmp_path}") for s in sources.values()]
    others = objects(tool, FEWER, leave_out=sources)
    done = run(tmp_path, tool, [*mine, *others], mutant.cases)
    assert done.returncode != 0
    assert re.search(report, done.stdout + done.stderr)
