"""Proofs that are cited, not run again, while nothing that they depend on has changed.

A test that takes the fixture ``proof`` hands it all of its inputs. ``proofs.json`` holds a hash of
them for each such test that has passed; where it is the same, the test passes by citing it.
Otherwise the test runs (in `make test` it is skipped), and the summary says that the file wants
updating: ``make proofs`` does it.
Another compiler is another input. A pytest plugin.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import quick

FILE = Path(__file__).with_name("proofs.json")
WRITE = os.environ.get("LAYERLR_PROOFS") == "write"
ROOT = FILE.parent.parent


def read() -> dict[str, str]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def digest(*inputs) -> str:
    """A hash of files, by their content, and of anything else, by its repr."""
    found = hashlib.sha256()
    for value in inputs:
        data = value.read_bytes() if isinstance(value, Path) else repr(value).encode()
        found.update(hashlib.sha256(data).digest())
    return found.hexdigest()[:16]


@functools.cache
def compiler() -> str:
    return subprocess.check_output(["c++", "--version"], text=True)


@functools.cache
def sources(flags: tuple[str, ...], *files: str | Path) -> tuple[Path, ...]:
    """What is compiled of these files: they and all headers of ours, as the compiler finds them."""
    command = ["c++", *flags, "-MM", "-x", "c++", *map(str, files)]
    words = subprocess.check_output(command, cwd=ROOT, text=True).replace("\\\n", " ").split()
    return tuple(sorted({(ROOT / w).resolve() for w in words if not w.endswith(":")}))


def compiled(flags: Sequence[str], *files: str | Path) -> str:
    """A hash of everything that compiled programs depend on."""
    return digest(compiler(), tuple(flags), *sources(tuple(flags), *files))


@pytest.fixture
def proof(request):
    """Whether this test has passed on the same inputs: ``if proof(...): return``."""
    name = f"{request.path.stem}::{request.node.name}"

    def cited(*inputs) -> bool:
        key = digest(request.path, *inputs)
        known = read().get(name) == key
        if not known and quick.active(request.config):
            pytest.skip(reason="what this depends on has changed: make test-all runs it")
        request.node.user_properties.append(("proof", [name, key, known]))
        return known

    return cited


def pytest_terminal_summary(terminalreporter):
    """Runs where the results of all processes come together."""
    passed = terminalreporter.stats.get("passed", [])
    found = [value for r in passed for key, value in r.user_properties if key == "proof"]
    fresh = {name: key for name, key, known in found if not known}
    if not found:
        return
    terminalreporter.write_sep("-", "proofs")
    terminalreporter.write_line(f"{len(found) - len(fresh)} cited from {FILE.name}")
    if fresh and WRITE:
        FILE.write_text(json.dumps({**read(), **fresh}, indent=0, sort_keys=True) + "\n")
        terminalreporter.write_line(f"{len(fresh)} run and recorded")
    elif fresh:
        terminalreporter.write_line(
            f"{len(fresh)} run, for something that they depend on has changed: `make proofs` "
            f"records them in {FILE.name}"
        )
