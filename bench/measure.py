"""One family of contenders on one model: set up, timed in turn, turned into rows."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import memory
from bench.builds import PEERS
from bench.peers import BASELINES, STREAM, Contender, Stream
from bench.report import NOT_INSTALLED, Row
from bench.shapes import MODELS, shapes
from bench.timing import Lane, Spread, Timer, ratios, run_rounds, timer_for

# On a GPU: enough for the median of a few short steps, and for the references not to take it all.
GPU_ROUNDS = {"sample_seconds": 0.005, "lane_seconds": 2.0}


@dataclass(frozen=True)
class Case:
    """What is run: everything but the contenders."""

    model: str
    family: str
    device: torch.device
    dtype: torch.dtype
    repeats: int
    clock: str = "wall"
    flush: bool | None = None
    deadline: float = math.inf  # of time.monotonic(): nothing is begun after it
    interleaved: bool = True

    @property
    def name(self) -> str:
        return self.model + ("" if self.dtype == torch.float32 else f", {_name(self.dtype)}")

    def label(self, contender: str) -> str:
        return f"{self.name}: {contender}"


@dataclass(frozen=True)
class Entry:
    contender: Contender
    lane: Lane
    extra_bytes: int | None = None
    stream_bytes: int | None = None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_params(case: Case) -> list[Tensor]:
    """Weights and gradients of ordinary size, the same in every run.

    No gradient is near zero: its square would underflow where a peer's state is in float16.
    """
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    params = [normal(shape).mul_(0.02).to(case.dtype) for shape in shapes(case.model)]
    for p in params:
        g = normal(tuple(p.shape))
        p.requires_grad_().grad = (g + g.sign()).mul_(0.05).to(case.dtype)
    return params


def _prepare(contender: Contender, params: list[Tensor], grads: list[Tensor]) -> Entry:
    """Build one contender, take its first step, and see that it changed the weights."""
    stepper = contender.build(params)
    lane = Lane(contender.name, stepper.step)
    if isinstance(stepper, Stream):
        return Entry(contender, lane, stream_bytes=stepper.bytes)

    def restore() -> None:
        for p, g in zip(params, grads, strict=True):
            assert p.grad is not None
            p.grad.copy_(g)

    if contender.writes_grad:
        lane.restore = restore
    before = params[-1].detach().clone()
    stepper.step()
    lane.restore()
    # Half precision may round a step this small away.
    if before.dtype.itemsize >= 4 and torch.equal(before, params[-1]):
        raise RuntimeError("a step left the weights as they were")
    extra = memory.extra_bytes(stepper.step, params[0].device)
    lane.restore()
    return Entry(contender, lane, extra)


def measure(
    case: Case,
    chosen: Sequence[Contender],
    left_out: dict[str, str],
    tick: Callable[[], object],
) -> list[Row]:
    """Rows of all the chosen contenders; those that fail go to ``left_out`` with the reason.

    They share weights and gradients and keep a state each: GPT-2 under a dozen Adams then fits in
    16 GiB, and luck with physical pages is shared too. Where a GPU cannot hold them side by side,
    they run one after the other.
    """
    size = MODELS[case.model][2]
    everybody = case.label(f"all of {case.family}")
    if reason := memory.shortage(memory.weights_bytes(size, case.dtype), case.device):
        left_out[everybody] = reason
        return []
    together = memory.fit_together(chosen, case.family, size, case.dtype, case.device)
    case = replace(case, interleaved=together)
    params = make_params(case)
    timer = timer_for(case.device, case.clock, case.flush)
    entries: list[Entry] = []
    for group in [chosen] if together else [[contender] for contender in chosen]:
        entries += _run(case, group, params, timer, left_out, tick)
    if not all(bool(p.isfinite().all()) for p in params):
        left_out[everybody] = "in the end a weight was not finite"
        return []
    return _rows(case, entries, len(params), size)


def _run(
    case: Case,
    group: Sequence[Contender],
    params: list[Tensor],
    timer: Timer,
    left_out: dict[str, str],
    tick: Callable[[], object],
) -> list[Entry]:
    """Time a group of contenders in turn; they keep no memory beyond that."""
    entries: list[Entry] = []
    grads: list[Tensor] = []
    for contender in group:
        reason = _obstacle(case, contender)
        try:
            if reason is None:
                if contender.writes_grad and not grads:
                    grads = [p.grad.clone() for p in params if p.grad is not None]
                entries.append(_prepare(contender, params, grads))
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        if reason is not None:
            left_out[case.label(contender.name)] = reason
    how = GPU_ROUNDS if case.device.type == "cuda" else {}
    run_rounds([entry.lane for entry in entries], case.repeats, timer, tick=tick, **how)
    for entry in entries:
        entry.lane.close()
    return entries


def _obstacle(case: Case, contender: Contender) -> str | None:
    """Why a contender need not be tried, or None."""
    if time.monotonic() > case.deadline:
        return "no time left"
    if contender.package in PEERS and importlib.util.find_spec(contender.package) is None:
        return f"{contender.package}{NOT_INSTALLED}"
    need = memory.own_bytes(contender, case.family, MODELS[case.model][2], case.dtype)
    return memory.shortage(need, case.device)


def _rows(case: Case, entries: Sequence[Entry], tensors: int, count: int) -> list[Row]:
    by_name = {entry.contender.name: entry for entry in entries}
    baseline = by_name.get(BASELINES[case.family])
    stream = by_name.get(STREAM[case.device.type])
    stream_speed = _speed(stream, count, case.dtype) if stream else None

    def row(entry: Entry) -> Row:
        contender, lane = entry.contender, entry.lane
        seconds = Spread.of(lane.seconds)
        speed = _speed(entry, count, case.dtype)
        timed = entry.stream_bytes is None
        return Row(
            model=case.model,
            tensors=tensors,
            parameters=count,
            dtype=_name(case.dtype),
            family=case.family,
            contender=contender.name,
            package=contender.package,
            rule=contender.rule,
            seconds=seconds,
            ratio=ratios(lane, baseline.lane, case.interleaved) if timed and baseline else None,
            bytes_per_param=contender.bytes_per_param(case.dtype),
            gb_per_s=speed,
            of_stream=speed / stream_speed if speed and stream_speed else None,
            us_per_tensor=seconds.median / tensors * 1e6 if timed else None,
            rounds=len(lane.seconds),
            steps_per_sample=lane.steps_per_sample,
            backend=contender.backend,
            once_bytes_per_param=contender.once_bytes_per_param(case.dtype),
            host_seconds=Spread.of(lane.host) if timed and lane.host else None,
            extra_bytes=entry.extra_bytes,
            interleaved=case.interleaved,
        )

    return [row(entry) for entry in entries]


def _speed(entry: Entry, count: int, dtype: torch.dtype) -> float | None:
    """GB/s at the bytes the design moves; None where that is unknown or too little to tell."""
    moved = entry.stream_bytes
    if moved is None:
        moved = (entry.contender.bytes_per_param(dtype) or 0) * count
    return moved / statistics.median(entry.lane.seconds) / 1e9 if moved > 1e6 else None
