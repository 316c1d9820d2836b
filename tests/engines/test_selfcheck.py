"""The self-check, and what it says of engines that are wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import layerlr
from layerlr import __main__ as command
from layerlr import devices, selfcheck
from layerlr.backends import BACKENDS
from layerlr.backends.config import LR
from layerlr.backends.reference import ReferenceBackend, ReferencePlan

checks = sys.modules["layerlr.selfcheck"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without Triton's interpreter and the emulation, which tests of their own are for."""
    monkeypatch.delitem(BACKENDS, "simt")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class Wrong(ReferenceBackend):
    """The reference at twice the rate from the second step on, under rules alone."""

    name = "wrong"

    def plan(self, spec):
        plan = ReferencePlan(spec)
        right = plan.step

        def step(config):
            late = spec.rule is not None and plan.steps
            right(config.replaced(LR, 2 * config.values[LR]) if late else config)

        plan.step = step
        return plan


class Broken(ReferenceBackend):
    name = "broken"

    def plan(self, spec):
        raise OSError("no such kernel\nfor you")


# -- the self-check --------------------------------------------------------------------------------


def test_engines_of_this_machine_agree(capsys):
    findings = {finding.backend: finding for finding in selfcheck()}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(findings)
    assert findings["cpu"].verdict == "agrees" and findings["cpu"].device == "cpu"
    assert f"cpu on cpu agrees: {len(checks.CASES)} cases, 2 steps each" in printed
    for finding in findings.values():
        assert finding.good, finding
    if not torch.cuda.is_available():
        assert "reference" not in findings  # it is what the others are held against
        assert findings["triton"].verdict == findings["cuda"].verdict == "missing"
        assert findings["triton"].device is None and "GPU" in findings["triton"].detail


def test_a_wrong_engine_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS, "wrong", Wrong())
    found = {f.backend: f for f in selfcheck("cpu")}
    assert found["cpu"].verdict == "agrees"
    assert found["wrong"].verdict == "differs" and not found["wrong"].good
    ruled = sum(case.rule is not None for case in checks.CASES)
    # the largest of all is one in float64, whose units are the smallest
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("wrong on cpu differs: ") and "float64" in line
    count = f"{ruled} of {len(checks.CASES)} cases differ"
    assert line.endswith(f"units in the last place, allowed 16; {count}")
    assert command.main([]) == 1
    assert command.main(["--no-check"]) == 0


def test_an_engine_that_raises_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS, "broken", Broken())
    assert selfcheck("cpu")[-1].verdict == "fails"
    assert "broken on cpu fails: SGD no rule" in capsys.readouterr().out
    assert command.main([]) == 1
    monkeypatch.setattr(devices, "lost", lambda device: True)
    assert "the device was lost" in selfcheck("cpu")[-1].detail


def test_tensors_of_the_check_are_odd():
    for dtype in {case.dtype for case in checks.CASES}:
        params = checks.tensors(dtype, torch.device("cpu"))
        twins = checks.tensors(dtype, torch.device("cpu"))
        assert all(torch.equal(p, q) and torch.equal(p.grad, q.grad) for p, q in zip(params, twins))
        assert {p.dtype for p in params} == {dtype}
        assert len({p.data_ptr() % 16 for p in params}) >= min(3, 16 // params[0].element_size())
        assert [p.numel() for p in params].count(0) == 1
        assert [p.is_contiguous() for p in params].count(False) == 2
        assert max(p.numel() for p in params) > 2**16
    assert {case.dtype for case in checks.CASES if case.rule} == set(
        [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    )


def test_speed_on_a_gpu(monkeypatch):
    """Of all bytes that a step and a copy move; timed on a GPU, here with a clock of lead."""
    runs = []

    def seconds(run, device):
        runs.append(run())
        return 0.5

    monkeypatch.setattr(checks, "seconds", seconds)
    monkeypatch.setattr(checks, "LAYER", 1024)
    monkeypatch.setattr(checks, "COPY", 1000)
    assert checks.speeds("cpu", torch.device("cpu")) == (16 * 1024 * 20 / 0.5, 8000 / 0.5)
    assert len(runs) == 2
    found = checks.Finding("cuda", "cuda", "agrees", "10 cases", 3.6e12, 0.9)
    assert found.text.endswith("; SGD on 64 MiB of weights: 3600 GB/s, 90% of a copy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match=r"selfcheck\(device='cuda'\) finds no GPU"):
        selfcheck("cuda")


def test_command():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "layerlr", "--no-check"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    for word in (f"layerlr {layerlr.__version__}", torch.__version__, "GPU: ", "Driver: "):
        assert word in done.stdout
    assert layerlr._C.instruction_set() in done.stdout
    assert 'backend="auto" for parameters on cpu: cpu' in done.stdout
    assert "agrees" not in done.stdout
    if not torch.cuda.is_available():
        assert 'backend="auto" for parameters on cuda: none, finds no GPU' in done.stdout
        assert "triton missing: " in done.stdout and "cuda missing: " in done.stdout
