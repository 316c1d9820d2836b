"""Other compilers than the build's: what they refuse, the build's lets pass.

Skipped where a machine has none; with clang or a cross compiler on the PATH it runs.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: two files that include the same headers, the choice among instruction sets, a loop over elements
SOURCES = ["csrc/plan.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/dispatch.cpp"]
KERNELS = "csrc/cpu/kernels_default.cpp"
FLAGS = [
    *"-std=c++17 -O0 -fPIC -shared -Icsrc -ffp-contract=off -fno-math-errno".split(),
    *"-Wall -Wextra -Werror -Wno-psabi -Wno-unknown-pragmas".split(),
    "-DLAYERLR_DIRECTIONS(X)=X(RmspropCentered) X(AmsGrad)",  # all is slow to compile
]

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not the source tree")


def others():
    """Names of the compilers on the PATH that are not c++ itself, each once."""
    found = {}
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        for file in sorted(folder.glob("*++*")):
            if re.fullmatch(r"clang\+\+(-\d+)?|([\w-]+-linux-gnu-)?g\+\+(-\d+)?", file.name):
                found.setdefault(file.resolve(), file.name)
    found.pop(Path(shutil.which("c++") or "").resolve(), None)
    return sorted(found.values())


@pytest.mark.parametrize(
    "compiler",
    others() or [pytest.param("", marks=pytest.mark.skip(reason="no compiler beside c++"))],
)
def test_engine_compiles_and_links(compiler, tmp_path):
    machine = subprocess.check_output([compiler, "-dumpmachine"], text=True)
    of_x86 = ["-DLAYERLR_X86=1"] if machine.startswith("x86_64") else []
    command = [compiler, *FLAGS, *of_x86, *SOURCES, KERNELS, "-o", tmp_path / "engine.so"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
