"""The source distribution: it holds what git does, and each source finds its headers in it.

It is not compiled: the wheel of the working tree is, from the same files (.ci/run).
"""

import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full("source distribution")

ROOT = Path(__file__).resolve().parents[2]
#: what a checkout has for its own sake; PKG-INFO and egg-info are setuptools'
OF_GIT_ALONE = {".ci/run", ".gitignore", ".pre-commit-config.yaml"}

BUILD = """
import sys
sys.path.insert(0, "build_backend")
import backend
backend.build_sdist(sys.argv[1])
"""
#: the compiler's commands that setup.py would run, without those that link
COMMANDS = """
import setuptools, shlex, sys
setuptools.setup = lambda **keywords: None
sys.argv[0] = "setup.py"
setup = {"__file__": "setup.py", "__name__": "setup"}
exec(compile(open("setup.py").read(), "setup.py", "exec"), setup)
files = setup["build_files"](setup["find_torch"](), setup["native_extensions"]())
for name, text in zip(("shared.ninja", "own.ninja"), files.values(), strict=True):
    open(name, "w").write(text)
"""


def in_git():
    """Whether the tests lie in a checkout."""
    command = ["git", "-C", ROOT, "rev-parse", "--show-toplevel"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and Path(done.stdout.strip()) == ROOT


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of the unpacked source distribution."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="it builds it")
    assert setuptools
    if not in_git():
        pytest.skip(reason="the tests are not in a checkout of git")
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=ROOT, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (found,) = (x for x in folder.iterdir() if x.is_dir())
    return found


def test_holds_what_git_does(unpacked):
    command = "git ls-files --cached --others --exclude-standard".split()
    listing = subprocess.check_output(command, cwd=ROOT, text=True)
    wanted = {x for x in listing.splitlines() if (ROOT / x).is_file()}
    there = {str(f.relative_to(unpacked)) for f in unpacked.rglob("*") if f.is_file()}
    assert sorted(wanted - OF_GIT_ALONE - there) == []
    made = {"PKG-INFO", "setup.cfg"}
    assert sorted(x for x in there - wanted - made if "egg-info" not in x) == []


def preprocess(command, folder):
    """Errors of the preprocessor under a command that compiles."""
    words = shlex.split(command.partition(" >")[0])  # what nvcc says goes to a log
    for option in ("-MF", "-o"):
        at = words.index(option)
        del words[at : at + 2]
    words[words.index("-MMD")] = "-MM"
    words.remove("-c")
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_every_source_finds_its_headers(unpacked):
    """By the preprocessor alone, with the flags of the build."""
    subprocess.run([sys.executable, "-c", COMMANDS], cwd=unpacked, check=True)
    steps = []
    for name in ("shared.ninja", "own.ninja"):
        listing = subprocess.check_output(["ninja", "-f", name, "-t", "compdb"], cwd=unpacked)
        steps += [x for x in json.loads(listing) if " -c " in x["command"]]
    assert {Path(x["file"]).suffix for x in steps} <= {".cpp", ".cu"}
    for step in steps:
        done = preprocess(step["command"], unpacked)
        assert done.returncode == 0, done.stderr
        # the headers are those of the archive, and no others of ours
        ours = [x for x in done.stdout.split() if x.startswith(str(ROOT / "csrc"))]
        assert str(unpacked) in done.stdout and not ours, step["file"]
