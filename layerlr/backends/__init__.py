"""Backends: ways to run the same plan."""

from __future__ import annotations

from .base import COLUMNS, Backend, Plan, PlanSpec
from .config import StepConfig
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

#: fastest first; ``backend="auto"`` takes the first that supports the case
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CudaBackend(), CpuBackend(), TritonBackend(), ReferenceBackend())
}

#: end of every message that a backend is missing or cannot run
HELP = "python -m layerlr says what runs here"


def validate(name: str) -> None:
    """Raise ValueError for a name that is neither ``"auto"`` nor a backend's."""
    known = ("auto", *BACKENDS)
    if name not in known:
        raise ValueError(
            f"unknown backend {name!r}, available are {', '.join(map(repr, known))}; {HELP}"
        )


def choose(name: str, spec: PlanSpec) -> Backend:
    """The named backend, or for ``"auto"`` the fastest that supports the case.

    Raises
    ------
    RuntimeError
        Where the named backend does not support the case; the message names those that do.
    """
    reasons = {n: b.unsupported(spec) for n, b in BACKENDS.items()}
    able = [n for n, reason in reasons.items() if reason is None]
    if name == "auto":
        return BACKENDS[able[0]]
    if reasons[name] is not None:
        use = " or ".join(f"backend={n!r}" for n in able)
        raise RuntimeError(f"backend {name!r} {reasons[name]}; use {use}; {HELP}")
    return BACKENDS[name]


__all__ = ["BACKENDS", "COLUMNS", "Backend", "Plan", "PlanSpec", "StepConfig", "choose", "validate"]
