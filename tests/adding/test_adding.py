"""docs/adding.md: a rule and a direction are added to a copy by the files that it lists, and step.

``pieces/`` holds the files that are new, `ROWS` what goes into files that are there. Every
engine that runs here then takes steps, and float64 numpy has the formulas once more.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import proofs
import pytest
import simt_engine
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PIECES = HERE / "pieces"
PAGE = (ROOT / "docs/adding.md").read_text()
missing = simt_engine.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")


class Row(NamedTuple):
    """Text that goes into a file, where a pattern ends."""

    of: str
    file: str
    pattern: str
    text: str


RULE_FOR_TRITON = '''
@triton.jit
def _damped(ww, gg, uu, wu, lr, l2, memory, h):
    """``b = -lr*f``, ``f = |w| / (|w| + damping*|u|)``; h: damping."""
    w, u = tl.sqrt(ww), tl.sqrt(uu)
    f = tl.where(u > 0, w / (w + tl.load(h) * u), 1.0)
    return 1.0, 1.0, -(lr * f), f

'''
DIRECTION_FOR_TRITON = '''
@triton.jit
def _soft_sign_scalars(h, t):
    """``beta, 1 - beta, eps``."""
    return tl.load(h), 1.0 - tl.load(h), tl.load(h + 1)


@triton.jit
def _soft_sign_direction(g, s, c):
    """``u = m / (|m| + eps)``; m moves as a momentum does."""
    return quotient(s[0], root(s[0] * s[0]) + scalar(c, 2, g))

'''
RULE_ROW = """
    "damped": Rule(_damped, update=True, measures_ww=True),"""
DIRECTION_ROW = """
    "soft_sign": Direction(
        _soft_sign_scalars, _momentum_advance, _soft_sign_direction, 1, _full_rate
    ),"""

LISTED = r"(?m)^  X\(\w+\)$"  # the last of a macro's list
TABLE = r"(?s)\nRULES: .*?\{|\nDIRECTIONS: .*?\{"
ROWS = [
    Row("rule", "csrc/rules/all.h", r"(?s).*#include .*?\n", '#include "rules/damped.h"\n'),
    Row("rule", "csrc/rules/all.h", LISTED, " \\\n  X(Damped)"),
    Row(
        "rule", "layerlr/rules/__init__.py", r"from .curvature .*\n", "from .damped import Damped\n"
    ),
    Row("rule", "layerlr/rules/__init__.py", r"_FORMULAS = \(.*(?=\))", ", Damped"),
    Row("rule", "kernels/rules.py", r"(?s).*\n(?=\n#: name -> rule)", RULE_FOR_TRITON),
    Row("rule", "kernels/rules.py", r"(?s).*,(?=\n\}\n)", RULE_ROW),
    Row(
        "direction",
        "csrc/directions/all.h",
        r"(?s).*#include .*?\n",
        '#include "directions/soft_sign.h"\n',
    ),
    Row("direction", "csrc/directions/all.h", LISTED, " \\\n  X(SoftSign)"),
    Row(
        "direction",
        "layerlr/directions/__init__.py",
        r"from .sgd .*\n",
        "from .soft_sign import SoftSign\n",
    ),
    Row(
        "direction",
        "layerlr/directions/__init__.py",
        r"\n        Lion\(\),",
        "\n        SoftSign(),",
    ),
    Row(
        "direction",
        "kernels/directions.py",
        r"(?s).*\n(?=\n#: name -> direction)",
        DIRECTION_FOR_TRITON,
    ),
    Row("direction", "kernels/directions.py", r"(?s).*,(?=\n\}\n)", DIRECTION_ROW),
    Row(
        "direction",
        "layerlr/optimizers/__init__.py",
        r"from .sgd .*\n",
        "from .soft_sign import SoftSign\n",
    ),
    Row("direction", "layerlr/__init__.py", r"from .optimizers import .*Lion", ", SoftSign"),
]


def pieces(of: str) -> list[Path]:
    """New files of a rule or a direction, relative to the project."""
    files = [p.relative_to(PIECES) for p in PIECES.rglob("*.*")]
    return sorted(f for f in files if (f.parent.name == "rules") == (of == "rule"))


def add(folder: Path) -> None:
    """Copy the package's sources to a folder; add the rule and the direction."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "kernels")
    shutil.copytree(ROOT / "layerlr", folder / "layerlr", ignore=skip)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    for of in ("rule", "direction"):
        for piece in pieces(of):
            assert not (folder / piece).exists()
            shutil.copy(PIECES / piece, folder / piece)
    for row in ROWS:
        text = (folder / row.file).read_text()
        (found,) = re.finditer(row.pattern, text)
        (folder / row.file).write_text(text[: found.end()] + row.text + text[found.end() :])
    (folder / "kernels").rename(folder / "layerlr/kernels")


def link(folder: Path) -> None:
    """The CPU engine and the emulated CUDA engine, of two directions and one instruction set."""
    listed = re.findall(r"X\((\w+)\)", (folder / "csrc/directions/all.h").read_text())
    few = f"-DLAYERLR_DIRECTIONS(X)=X({listed[0]}) X({listed[-1]})"
    native = [f for at in ("", "cpu/", "cuda/") for f in folder.glob(f"csrc/{at}*.cpp")]
    native = [f for f in native if not f.stem.endswith(("_avx2", "_avx512"))]
    unit = folder / "all.cpp"
    unit.write_text("".join(f'#include "{file}"\n' for file in sorted(native)))
    system = [*include_paths(), sysconfig.get_paths()["include"]]
    shared = ["c++", *"-shared -fPIC -O0 -g0 -w -fopenmp -pthread".split()]
    shared += [*"-ffp-contract=off -fno-math-errno -std=c++20".split(), f"-I{folder / 'csrc'}", few]
    shared.append('-DLAYERLR_LAYOUT="of the test"')
    shared += [word for path in system for word in ("-isystem", path)]
    libraries = [f"-L{path}" for path in library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch_python"]
    end = sysconfig.get_config_var("EXT_SUFFIX")
    simt = ROOT / "tests/simt"
    emulated = [f"-I{simt}", *simt_engine.DEFINES, simt / "library.cpp", simt / "simt.cpp"]
    without = ["-fvisibility=hidden", '-DLAYERLR_NO_CUDA="left out"']
    for command in (
        [*shared, *without, unit, *libraries, "-o", folder / f"layerlr/_C{end}"],
        [*shared, *emulated, "-o", folder / "_simt.so"],
    ):
        subprocess.run(command, check=True)


#: the directions of each object of kernels, by header
GROUPS = """
import json, setuptools, sys
setuptools.setup = lambda **keywords: None
sys.argv[0] = "setup.py"
setup = {"__file__": sys.argv[1], "__name__": "setup"}
exec(compile(open(sys.argv[1]).read(), "setup.py", "exec"), setup)
print(json.dumps(setup["directions"].groups()))
"""


def listed(of: str) -> set[str]:
    """Files of the product that the page names for a rule or a direction."""
    title = "A rule" if of == "rule" else "A direction"
    (section,) = re.findall(rf"(?s)\n## {title}\n(.*?)\n## ", PAGE)
    name = "damped" if of == "rule" else "soft_sign"
    rows = re.findall(r"(?m)^\| (`.*?) \|", section)
    files = {f.replace("NAME", name) for row in rows for f in re.findall(r"`([\w/.]+)`", row)}
    return {f for f in files if f.startswith(("layerlr/", "csrc/", "kernels/"))}


@pytest.mark.parametrize("of", ["rule", "direction"])
def test_these_are_the_files_that_the_page_lists_and_counts(of):
    touched = {str(f) for f in pieces(of)} | {row.file for row in ROWS if row.of == of}
    assert touched == listed(of)
    (counted,) = re.findall(rf"\n\| {of} \|.*?\|.*?\| (\d+) \|", PAGE)
    assert int(counted) == len(touched)


def test_what_is_added_steps_on_every_engine(proof, tmp_path):
    folders = ("layerlr", "csrc", "kernels", "tests/simt", "tests/adding")
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.*"))]
    files = [f for f in files if f.suffix not in (".so", ".pyc") and f.is_file()]
    if proof(proofs.compiler(), *files, ROOT / "setup.py", ROOT / "tests/simt_engine.py"):
        return
    add(tmp_path)
    link(tmp_path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ""}
    command = [sys.executable, HERE / "steps.py", tmp_path, ROOT / "tests"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    engines = {"reference", "cpu", "simt"} | (
        {"triton"} if importlib.util.find_spec("triton") else set()
    )
    assert set(json.loads(done.stdout.splitlines()[-1])) == engines


def test_the_build_makes_kernels_of_a_new_direction(tmp_path):
    pytest.importorskip("setuptools", reason="setup.py imports it")
    add(tmp_path)
    shutil.copytree(ROOT / "build_backend", tmp_path / "build_backend")
    shutil.copy(ROOT / "setup.py", tmp_path)
    command = [sys.executable, "-c", GROUPS, tmp_path / "setup.py"]
    there = {**os.environ, "LAYERLR_CUDA_LIBRARY": ""}  # a library of other sources would not fit
    done = subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["soft_sign"] == "X(SoftSign)"
