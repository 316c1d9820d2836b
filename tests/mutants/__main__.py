"""Which mistakes the tests of an engine catch: python -m tests.mutants cpu [NAME...] [--tests DIR].

For each mutant of ``ENGINE.txt`` the packages are copied, changed and tested, at first by the tests
that are likely to catch it, then by everything that the engine is asked; the first failure ends it.
``--tests`` names a checkout whose tests are asked instead of these (an older table). Results go to
``ENGINE.json``: the test that caught the mutant, or null.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: seconds of CPU after which tests are taken to hang: an unchanged engine needs less
PATIENCE = 900
NOT_ASKED = "pytest ended with"
#: in the order in which they catch most
FILES = "parity edges nonfinite layers halves layer_stats split precision precision_state amp"
FILES += " max_grad_norm rated start_radius plain_lr wrap triton twins vectors refusals"
FILES += " step_in_backward step_in_backward_changes native timm properties adam_mini wrap_bounds"
FILES += " wrong_values codes code_values rules_everywhere sharded_codes"
#: whose tests ask an engine: what holds another engine against the reference asks both
ASKED = {"reference": "(reference or cpu)"}
CXX = [
    *"c++ -std=c++17 -O0 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno".split(),
    *"-fopenmp -Wno-psabi -Icsrc -c".split(),
]
#: what a header of the engine is compiled into
UNITS = ("engine.cpp", "kernels_default.cpp", "dispatch.cpp")


class Mutant(NamedTuple):
    """A mistake in a source."""

    name: str
    file: str
    likely: list[str]
    old: str
    new: str


def read(engine: str) -> list[Mutant]:
    found = []
    for block in (HERE / f"{engine}.txt").read_text().split("\n\n")[1:]:
        head, *lines = block.splitlines()
        name, file, likely = head.split()
        sides = ("\n".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")
        found.append(Mutant(name, file, likely.split(","), *sides))
    return found


def changed(mutant: Mutant) -> str:
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} no longer holds its lines once")
    return text.replace(mutant.old, mutant.new)


def place(mutant: Mutant, folder: Path) -> None:
    """Lay out the package with the mistake in a folder."""
    skip = shutil.ignore_patterns("__pycache__", "kernels")  # kernels may be a link
    shutil.copytree(ROOT / "layerlr", folder / "layerlr", ignore=skip)
    shutil.copytree(ROOT / "kernels", folder / "layerlr/kernels", ignore=skip)
    file = mutant.file.replace("kernels/", "layerlr/kernels/")
    if file.startswith("csrc/"):
        shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / file).write_text(changed(mutant))
    if file.startswith("csrc/"):
        link(folder, file)


def link(folder: Path, file: str) -> None:
    """The extension, whose CPU engine is compiled of the changed sources and without optimisation.

    So is the changed file, if it is a source; the other objects are those of the last build.
    """
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    objects = []
    units = dict.fromkeys([*(f"csrc/cpu/{unit}" for unit in UNITS), file])
    system = [*include_paths(), sysconfig.get_paths()["include"]]
    headers = [word for path in system for word in ("-isystem", path)]
    for unit in units:
        if unit.endswith(".cpp"):
            objects.append(folder / f"{Path(unit).name}.o")
            words = [] if unit.startswith("csrc/cpu/") else [*headers, "-std=c++20"]
            subprocess.run([*CXX, *words, unit, "-o", objects[-1]], cwd=folder, check=True)
    pair = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    built = [ROOT / "build" / "ninja", ROOT / "build" / f"ninja-{pair}"]
    # an object of the second folder may be left from a build that had the source there
    made = {f"csrc/{o.stem}": o for there in reversed(built) for o in there.glob("csrc/*.o")}
    made |= {f"csrc/cuda/{o.stem}": o for o in built[0].glob("csrc/cuda/*.o")}
    others = [o for source, o in made.items() if (ROOT / source).is_file() and source != file]
    (target,) = (folder / "layerlr").glob("_C.*.so")
    target.unlink()
    paths = [f"-L{p}" for p in library_paths()]
    # the changed objects first: the linker takes the first of equal inline functions
    command = ["c++", "-shared", *objects, *others, *paths]
    command += ["-lc10", "-ltorch_cpu", "-ltorch_python", "-fopenmp", "-o", target]
    subprocess.run(command, check=True)


class First:
    """The first test that failed."""

    test = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.test is None:
            self.test = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and self.test is None:
            self.test = f"collecting {report.nodeid}"


def ask(folder: Path, tests: Path, words: list[str]) -> str | None:
    """The first failure of a selection of tests over the package in a folder, in a process."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        os.chdir(tests)
        sys.path[:0] = [str(folder), str(tests)]
        out = os.open(folder / "out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        first = First()
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *words], plugins=[first])
        if code not in (0, 1, 5) and not first.test:  # 5: nothing is selected
            first.test = f"{NOT_ASKED} {code!r}"
        sys.stdout.flush()
        os.write(theirs, (first.test or "").encode())
        os._exit(0)
    os.close(theirs)
    answer = b""
    while part := os.read(ours, 4096):
        answer += part
    os.close(ours)
    _, status = os.waitpid(child, 0)
    if answer.decode().startswith(NOT_ASKED):
        raise SystemExit((folder / "out.txt").read_text()[-2000:])
    return answer.decode() or ("crashed or hung" if status else None)


def caught(engine: str, mutant: Mutant, tests: Path, everything: bool) -> str | None:
    files = {f.stem.removeprefix("test_"): str(f) for f in tests.glob("tests/**/test_*.py")}
    files = [files[name] for name in FILES.split() if name in files]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place(mutant, folder)
        texts = {f: Path(f).read_text() for f in files}
        likely = [
            f
            for f in files
            if any(f"def {t}(" in texts[f] or Path(f).stem == t for t in mutant.likely)
        ]
        asked = ASKED.get(engine, engine)
        names = " or ".join(mutant.likely)
        found = None
        for words in (f"{asked} and ({names})", names) if likely else ():  # some name no engine
            found = found or ask(folder, tests, ["-k", words, *likely])
        return found or (ask(folder, tests, ["-k", asked, *files]) if everything else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=[f.stem for f in HERE.glob("*.txt")])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tests", type=Path, default=ROOT)
    parser.add_argument("--likely", action="store_true", help="no more than the likely tests")
    parser.add_argument("--table", default="new", help="the results' key")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    import hypothesis  # noqa: F401  (before the forks, once)
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    for mutant in read(arguments.engine):
        if arguments.names and mutant.name not in arguments.names:
            continue
        found = caught(arguments.engine, mutant, arguments.tests.resolve(), not arguments.likely)
        record = HERE / f"{arguments.engine}.json"
        results = json.loads(record.read_text()) if record.exists() else {}
        results.setdefault(mutant.name, {})[arguments.table] = found
        record.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{arguments.engine} {mutant.name}: {found or 'NOT CAUGHT'}", flush=True)


if __name__ == "__main__":
    main()
