"""The emulation on which CUDA kernels are tested without a GPU (tests/simt) is tested itself."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import proofs
import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=c++17 -Wall -Wextra -pthread -DLAYERLR_SIMT -Icsrc -Itests/simt".split()
SOURCES = ["tests/simt/selftest.cpp", "tests/simt/simt.cpp"]
BUILDS = {
    "plain": ["-O2"],
    "address": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all".split(),
    "thread": "-O1 -g1 -fsanitize=thread".split(),
}

#: what a build says of a kernel's mistake
CAUGHT = [
    ("small_shared", "address", "out of bounds for type"),
    ("unclamped_tail", "address", "heap-buffer-overflow"),
    ("misaligned_vector", "plain", "simt: a misaligned access"),
    ("misplaced_read", "plain", "simt: a misaligned access"),
    ("misplaced_write", "plain", "simt: a misaligned access"),
    ("missing_landing_barrier", "plain", "WRONG: normalize"),
    ("missing_landing_barrier", "thread", "data race"),
    ("refilled_too_early", "plain", "WRONG: normalize"),
    ("refilled_too_early", "thread", "data race"),
    ("reused_too_early", "thread", "data race"),
    ("unordered_after_wait", "thread", "data race"),
    ("unordered_neighbours", "thread", "data race"),
    ("relaxed_flag", "thread", "data race"),
    ("unset_flag", "plain", "64 live threads, 63 at __syncthreads, 1 waiting in load_acquire"),
    ("missing_lane", "plain", "64 live threads, 33 at __syncthreads, 31 waiting in __shfl_xor_"),
    ("divergent_barrier", "plain", "simt: DEADLOCK in block"),
    ("two_barriers", "plain", "simt: DIVERGENCE in block"),
]

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="the emulation switches stacks on x86-64 Linux only",
    ),
]


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """Run a part of a build of selftest.cpp, compiled when first asked for."""
    folder = tmp_path_factory.mktemp("simt")

    def run(build, part):
        program = folder / build
        if not program.exists():
            command = ["c++", *FLAGS, *BUILDS[build], *SOURCES, "-o", str(program)]
            subprocess.run(command, cwd=ROOT, check=True)
        env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"}
        return subprocess.run(
            [program, part], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "part",
    "sound collectives neighbours traffic placed indices resident schedules".split(),
)
def test_runs_right(selftest, build, part, proof):
    if proof(build, part, proofs.compiled(FLAGS, *SOURCES)):
        return
    done = selftest(build, part)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("mutant", "build", "report"), CAUGHT)
def test_catches(selftest, mutant, build, report, proof):
    if proof(mutant, build, report, proofs.compiled(FLAGS, *SOURCES)):
        return
    done = selftest(build, mutant)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr
