"""Fixtures: every backend of the registry on the devices that it runs on, every dtype."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import time

import pytest
import torch

_GPU = torch.cuda.is_available()
_TRITON = importlib.util.find_spec("triton") is not None
if not _GPU:  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
    if _TRITON:
        from interpreter import hasten

        with contextlib.suppress(AttributeError):  # another version's inside
            hasten()

_WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if _WORKER and hasattr(os, "sched_setaffinity"):
    # a core for each worker: some virtual machines put two busy processes on one
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(_WORKER.removeprefix("gw")) % len(_CORES)]})

pytest_plugins = ["quick", "proofs", "selection"]

import cases  # noqa: E402
import simt_engine  # noqa: E402

from layerlr.backends import BACKENDS  # noqa: E402

BACKENDS["simt"] = simt_engine.SimtBackend()

#: devices of a backend; those that are not listed run on the CPU
_DEVICES = {
    "reference": ["cpu", "cuda"] if _GPU else ["cpu"],
    "cuda": ["cuda"],
    "triton": ["cuda" if _GPU else "cpu"],
}


def _missing(backend: str) -> str | None:
    """Why an engine cannot be tried here, or None."""
    if backend == "triton" and not _TRITON:
        return "no Triton"
    return simt_engine.unavailable() if backend == "simt" else None


def _engines():
    for backend in BACKENDS:
        for device in _DEVICES.get(backend, ["cpu"]):
            name = backend if device in ("cpu", backend) else f"{backend}_{device}"
            if device == "cuda" and not _GPU:
                continue
            missing = _missing(backend)
            marks = pytest.mark.skip(reason=missing) if missing else ()
            yield pytest.param(cases.Engine(backend, device), id=name, marks=marks)


ENGINES = list(_engines())


def pytest_collection_finish():
    """Let the garbage collector pass by the tests themselves: it took a second each time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.fixture(params=ENGINES)
def engine(request) -> cases.Engine:
    return request.param


@pytest.fixture(params=[e for e in ENGINES if e.values[0] != ("reference", "cpu")])
def other(request) -> cases.Engine:
    """An engine that is held against the reference on the CPU."""
    return request.param


@pytest.fixture(params=cases.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=cases.DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
def wide(request) -> torch.dtype:
    """The dtypes that compute in themselves: float32 and float64."""
    return request.param


@pytest.fixture
def threads():
    """Set the number of torch's threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# -- on a GPU, one test must not take the others along ---------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """An error of the device belongs to the test that caused it, not to the next that waits."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    """A CUDA context that an error has spoiled fails all later tests: let xdist start anew."""
    if _WORKER and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            time.sleep(0.3)  # the report is on its way
            os._exit(70)


def pytest_runtest_logreport(report):
    """Append a line to the file TEST_LOG for each test as it ends, for runs that are cut short."""
    path = os.environ.get("TEST_LOG")
    if path and not _WORKER and (report.when == "call" or report.outcome != "passed"):
        reason = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
        line = [report.nodeid, report.outcome, round(report.duration, 3), *reason]
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
