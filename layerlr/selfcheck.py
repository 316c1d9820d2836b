"""`selfcheck`: whether every engine of this machine takes the steps of the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import devices, optimizers
from .agreement import bound, difference
from .backends import BACKENDS
from .optimizer import LayerwiseOptimizer


class Case(NamedTuple):
    """A line of the table of steps."""

    optimizer: str
    rule: str | None
    dtype: torch.dtype
    options: dict[str, Any]

    def __str__(self) -> str:
        words = [self.optimizer, self.rule or "no rule", str(self.dtype).removeprefix("torch.")]
        return " ".join([*words, *(f"{key}={value}" for key, value in self.options.items())])

    def make(self, params: list[Parameter], backend: str) -> LayerwiseOptimizer:
        """The optimizer over parameters."""
        optimizer: Callable[..., LayerwiseOptimizer] = getattr(optimizers, self.optimizer)
        return optimizer(params, lr=1e-2, rule=self.rule, backend=backend, **self.options)


CASES = (
    Case("SGD", None, torch.float32, {"momentum": 0.9}),
    Case("SGD", "singh", torch.bfloat16, {"momentum": 0.9, "weight_decay": 0.01}),
    Case("SGD", "lars", torch.float32, {"momentum": 0.9}),
    Case("SGD", "layca", torch.float32, {"momentum": 0.9, "nesterov": True}),
    Case("AMomSGD", "layca", torch.float16, {}),
    Case("Adagrad", "singh", torch.float64, {}),
    Case("RMSprop", "layca", torch.float32, {"momentum": 0.5, "centered": True}),
    Case("Adam", "layca", torch.float64, {"amsgrad": True}),
    Case("AdamW", None, torch.bfloat16, {}),
    Case("AdamW", "lamb", torch.float32, {}),
    Case("Lion", "layca", torch.float32, {}),
    Case("Adam", "layca", torch.float32, {"state_dtype": "8bit"}),
    Case("AdamW", "lamb", torch.bfloat16, {"state_dtype": "8bit", "precision": "kahan"}),
)
STEPS = 2

#: a layer of many chunks, one with codes of 8 bits, odd sizes, one element, no dimension, nothing;
#: two to take views of
SHAPES = (
    *((300, 257), (48, 98), (64, 3, 3, 3), (7, 5), (129,), (3,), (1,), (), (0, 5)),
    *((33, 62), (31, 17)),
)

#: weights of the step that is timed, 64 MiB, and the bytes that it moves for each: reads weight,
#: gradient and momentum, writes weight and momentum
LAYERS, LAYER = 16, 2**20
STEP_BYTES = 20
COPY = 2**26


class Finding(NamedTuple):
    """What the self-check has to say of an engine.

    Attributes
    ----------
    backend, device
        The engine, and where its parameters were; None where it is missing everywhere.
    verdict
        ``"agrees"`` with the reference, ``"differs"``, ``"fails"`` (it raised), ``"missing"``.
    detail
        How many steps agree; which case differs most and by how much; the error; the reason.
    bandwidth
        Bytes a second that a step of SGD with momentum over 64 MiB of weights moves; None: not on a
        GPU.
    of_copy
        Its share of a large copy's, which was timed beside it.
    """

    backend: str
    device: str | None
    verdict: Literal["agrees", "differs", "fails", "missing"]
    detail: str
    bandwidth: float | None = None
    of_copy: float | None = None

    @property
    def good(self) -> bool:
        """Whether there is nothing to mend: an engine may be missing."""
        return self.verdict in ("agrees", "missing")

    @property
    def text(self) -> str:
        """All but the engine, for a reader."""
        words = f"{self.verdict}: {self.detail}"
        if self.bandwidth is None or self.of_copy is None:
            return words
        speed = f"{self.bandwidth / 1e9:.0f} GB/s, {self.of_copy:.0%} of a copy"
        return f"{words}; SGD on 64 MiB of weights: {speed}"


def selfcheck(device: torch.device | str | None = None) -> list[Finding]:
    """Step every engine of this machine beside the reference, and print a line for each.

    ::

        max |w_engine - w_reference| <= 0 units in the last place without a rule,
                                        2 with one, 16 in float64

    Over two steps of thirteen optimizers with and without rules, in float64, float32, bfloat16 and
    float16, whose tensors have odd sizes, lie at any offset, with gaps, transposed, or are empty.
    On a GPU the bandwidth of a step and its share of a copy's come with it. Takes seconds, and 1
    GiB of a GPU; Triton's first run compiles for longer.

    Parameters
    ----------
    device
        Where the parameters are. None: in memory of the host, and on the current GPU, if any.

    Returns
    -------
    A `Finding` for each line.

    Raises
    ------
    RuntimeError
        For a GPU where there is none.

    Examples
    --------
    >>> import layerlr
    >>> assert all(finding.good for finding in layerlr.selfcheck("cpu"))  # doctest: +ELLIPSIS
    cuda ...
    """
    findings = []
    for backend, where, reason in engines(None if device is None else torch.device(device)):
        # before the steps: where one hangs, this is what is left of it
        print(f"{backend}{f' on {where}' if where else ''} ", end="", flush=True)
        if where is None:
            finding = Finding(backend, None, "missing", str(reason))
        else:
            finding = check(backend, where)
        print(finding.text, flush=True)
        findings.append(finding)
    return findings


def engines(device: torch.device | None) -> Iterator[tuple[str, torch.device | None, str | None]]:
    """(backend, device, None) of all that run here but the specification; (backend, None, reason).

    Raises
    ------
    RuntimeError
        For a GPU where there is none.
    """
    gpu = torch.device("cuda")
    places = [torch.device("cpu"), gpu] if device is None else [device]
    if device is not None and (reason := devices.absent(device)):
        raise RuntimeError(f"selfcheck(device={str(device)!r}) {reason}")
    for name, backend in BACKENDS.items():
        reasons = {place: backend.missing(place) for place in places}
        able = [place for place, reason in reasons.items() if reason is None]
        if not able:
            yield name, None, reasons[places[-1]]
        for place in able:
            if (name, place.type) != ("reference", "cpu"):
                yield name, place, None


def check(backend: str, device: torch.device) -> Finding:
    """Step one engine through the table, and time it where that is a GPU."""
    if devices.lost(device):
        return Finding(backend, str(device), "fails", "not tried, the device was lost before")
    wrong: list[tuple[float, str]] = []
    for case in CASES:
        other = case.make(tensors(case.dtype, torch.device("cpu")), "reference")
        try:
            mine = case.make(tensors(case.dtype, device), backend)
            off = difference(mine, other, STEPS)
        except Exception as error:  # of any kind: what it is, is the finding
            detail = f"{case}: {type(error).__name__}: {str(error)[:300]}"
            return Finding(backend, str(device), "fails", detail)
        allowed = bound(case.rule is not None, case.dtype)
        if off > allowed:
            wrong.append((off, f"{case} by {off:g} units in the last place, allowed {allowed}"))
    if wrong:
        detail = f"{max(wrong)[1]}; {len(wrong)} of {len(CASES)} cases differ"
        return Finding(backend, str(device), "differs", detail)
    found = Finding(backend, str(device), "agrees", f"{len(CASES)} cases, {STEPS} steps each")
    if device.type == "cpu":
        return found
    try:
        step, copy = speeds(backend, device)
    except torch.OutOfMemoryError:
        return found._replace(detail=f"{found.detail}, not timed for want of memory")
    return found._replace(bandwidth=step, of_copy=step / copy)


def tensors(dtype: torch.dtype, device: torch.device) -> list[Parameter]:
    """Parameters with gradients, the same values on every device, as views of one piece of memory.

    They lie back to back from the second element on, so at any alignment; the last two have gaps
    and are transposed.
    """
    sizes = [math.prod(shape) for shape in SHAPES]
    generator = torch.Generator().manual_seed(0)

    def views(scale: float) -> list[Tensor]:
        flat = torch.randn(1 + sum(sizes), generator=generator).mul_(scale).to(dtype).to(device)
        parts = zip(flat[1:].split(sizes), SHAPES, strict=True)
        *dense, wide, tall = (part.view(shape) for part, shape in parts)
        return [*dense, wide[:, 1::2], tall.t()]

    params = [Parameter(w) for w in views(0.02)]
    for p, g in zip(params, views(1.0), strict=True):
        p.grad = g
    return params


def speeds(backend: str, device: torch.device) -> tuple[float, float]:
    """Bytes a second of a step of SGD with momentum, and of a copy."""
    params = [Parameter(torch.ones(LAYER // 1024, 1024, device=device)) for _ in range(LAYERS)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optimizers.SGD(params, lr=1e-3, momentum=0.9, backend=backend)
    of_step = seconds(optimizer.step, device)
    source = torch.ones(COPY, device=device)
    target = torch.empty_like(source)
    of_copy = seconds(lambda: target.copy_(source), device)
    return LAYERS * LAYER * STEP_BYTES / of_step, 2 * source.nbytes / of_copy


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of a run on a GPU.

    All are queued behind milliseconds of other work, so that none waits for the host.
    """
    with torch.cuda.device(device):
        for _ in range(3):
            run()
        ahead = torch.empty(COPY, device=device)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        for _ in range(2 * repeats):
            ahead.fill_(0.0)
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        times = sorted(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
        return times[len(times) // 2]
