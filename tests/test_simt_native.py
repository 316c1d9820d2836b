"""The CUDA engine's kernels, run on the CPU, under sanitizers; and what a mistake in them shows."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    *"-std=c++17 -O1 -g1 -ffp-contract=off -fno-math-errno -pthread -Wno-psabi".split(),
    *"-Wno-unknown-pragmas -DLAYERLR_SIMT -DLAYERLR_TILE_THREADS=32 -Icsrc -Itests/simt".split(),
]
#: one state and the gradient in the second pass, three and not
DIRECTIONS = "X(Nesterov) X(AmsGrad)"
MUTANT_DIRECTIONS = "X(Nesterov)"  # fewer, to compile often
SOURCES = ["tests/native/cuda_driver.cpp", "csrc/cuda/schedule.cpp", "tests/simt/simt.cpp"]
CPU_PARTS = ("engine", "dispatch", "kernels_default")
CPU_ENGINE = [f"csrc/{name}.cpp" for name in ("plan", *(f"cpu/{part}" for part in CPU_PARTS))]

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
    "race": ("thread", "data race"),
    "overflow": ("address", "heap-buffer-overflow"),
    "misaligned": ("undefined", "misaligned address"),
    "wrong": (None, "WRONG"),
    "early": (None, "simt: a source changed before wait()"),
    "hang": (None, "simt: DEADLOCK"),
}


def read_mutants():
    for block in (ROOT / "tests/native/mutants.txt").read_text().split("\n\n")[1:]:
        head, *lines = block.splitlines()
        name, file, seen, cases = [*head.split(), "10-2"][:4]
        sides = ("\n".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")
        yield Mutant(name, file, seen, cases, *sides)


def sanitize(tool):
    return [f"-fsanitize={tool}", "-fno-sanitize-recover=all"] if tool else []


def compile(source, target, tool, directions, *flags):
    flags = [*flags, *FLAGS, *sanitize(tool), f"-DLAYERLR_DIRECTIONS(X)={directions}"]
    subprocess.run(["c++", *flags, "-c", source, "-o", target], cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Objects of the driver by source, compiled when first asked for; the CPU engine's as it is."""
    folder = tmp_path_factory.mktemp("objects")

    @lru_cache
    def build(source, tool, directions):
        name = f"{Path(source).stem}-{tool}-{len(directions)}.o"
        return compile(source, folder / name, tool, directions)

    def build_all(tool, directions):
        tools = dict.fromkeys(SOURCES, tool) | dict.fromkeys(CPU_ENGINE)
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(tools, pool.map(lambda s: build(s, tools[s], directions), tools)))

    return build_all


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
    ("tool", "cases"), [(None, "1"), ("address,undefined", "3"), ("thread", "7")]
)
def test_sanitizers(tool, cases, objects, tmp_path):
    """Schedules change no bit; the CPU engine agrees; nothing is out of bounds or unordered."""
    done = run(tmp_path, tool, objects(tool, DIRECTIONS).values(), cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10


def outcome(mutant, folder, tool, objects):
    """What the driver says with one text changed; other sources come from where they are."""
    home = ROOT / "csrc" if "/" in mutant.file else ROOT / "tests/simt"
    text = (home / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    changed = folder / mutant.file
    changed.parent.mkdir(exist_ok=True)
    changed.write_text(text.replace(mutant.old, mutant.new))
    sources = {s: s for s in SOURCES[:2]}  # the third does not include what is changed
    if changed.suffix == ".cpp":
        sources = {f"csrc/{mutant.file}": str(changed)}
    mine = {
        key: compile(source, folder / f"{i}.o", tool, MUTANT_DIRECTIONS, f"-I{folder}")
        for i, (key, source) in enumerate(sources.items())
    }
    return run(folder, tool, (objects | mine).values(), mutant.cases)


@pytest.fixture(scope="module")
def outcomes(request, objects, tmp_path_factory):
    """Outcome of each mutant, as a future; two at a time."""
    wanted = [
        item.callspec.params["mutant"]
        for item in request.session.items
        if item.fspath == request.fspath and item.originalname == "test_catches"
    ]
    ready = {tool: objects(tool, MUTANT_DIRECTIONS) for tool in {SEEN[m.seen][0] for m in wanted}}
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for m in wanted:
            tool = SEEN[m.seen][0]
            folder = tmp_path_factory.mktemp(m.id)
            futures[m] = pool.submit(outcome, m, folder, tool, ready[tool])
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.id) for m in read_mutants()])
def test_catches(mutant, outcomes):
    done = outcomes[mutant].result()
    assert done.returncode != 0
    assert SEEN[mutant.seen][1] in done.stdout + done.stderr
