"""Interleaved timing: every round takes one sample of every contender, in an order of its own."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Step = Callable[[], Any]


class Sample(NamedTuple):
    """Seconds per step and, where a device does the work, those of the host's call apart."""

    seconds: float
    host: float | None = None


Timer = Callable[[Step, int], Sample]


def _nothing() -> None:
    pass


#: bytes that are written to flush a core's own caches; what many share may hold more
CORE_CACHES = 64 << 20


def timer_for(device: torch.device, clock: str = "wall", flush: bool | None = None) -> Timer:
    """A function ``(step, n) -> Sample`` over n steps on ``device``.

    ``clock="cpu"`` counts the calling thread's processor time instead: for one thread on a
    machine that is busy with other work. ``flush``: empty the caches before each step, those of the
    core or a GPU's L2 (see `EventTimer`); by default on a GPU.
    """
    if device.type == "cuda":
        return EventTimer.cuda(device, flush is not False)
    if device.type != "cpu":
        raise NotImplementedError(f"step_time has no timer for {device.type!r}")
    now = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}[clock]

    def warm(step: Step, n: int) -> Sample:
        start = now()
        for _ in range(n):
            step()
        return Sample((now() - start) * 1e-9 / n)

    if not flush:
        return warm
    buffer = torch.zeros(CORE_CACHES, dtype=torch.uint8)

    def cold(step: Step, n: int) -> Sample:
        seconds = 0.0
        for _ in range(n):
            buffer.add_(1)
            seconds += warm(step, 1).seconds
        return Sample(seconds / n)

    return cold


@dataclass(frozen=True)
class EventTimer:
    """A step's time on the device, between two events, and apart from it the host's in the call.

    Before a step is timed on the device, the L2 cache is flushed and the device kept busy for
    longer than the host needs to enqueue the step: what lies between the events has no gaps in
    which the device waits for the host, unless the step itself waits for the device or has more
    launches than the device's queue holds, about a thousand.
    """

    event: Callable[[], Any]
    synchronize: Callable[[], Any]
    occupy: Callable[[float], Any]  # keeps the device busy for so many seconds
    flush: Callable[[], Any]
    now: Callable[[], float] = time.perf_counter

    @classmethod
    def cuda(cls, device: torch.device, flush: bool) -> EventTimer:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        buffer = torch.empty(2 * cache if flush else 0, dtype=torch.uint8, device=device)
        return cls(
            event=lambda: torch.cuda.Event(enable_timing=True),
            synchronize=lambda: torch.cuda.synchronize(device),
            occupy=lambda seconds: torch.cuda._sleep(int(seconds * 2e9)),  # cycles, at 2 GHz
            flush=buffer.zero_ if flush else _nothing,
        )

    def __call__(self, step: Step, n: int) -> Sample:
        host = statistics.median(self._host(step) for _ in range(n))
        return Sample(statistics.median(self._device(step, host) for _ in range(n)), host)

    def _host(self, step: Step) -> float:
        self.synchronize()
        start = self.now()
        step()
        return self.now() - start

    def _device(self, step: Step, host: float) -> float:
        start, end = self.event(), self.event()
        self.flush()
        self.occupy(1.5 * host + 50e-6)
        start.record()
        step()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) * 1e-3  # of milliseconds


@dataclass
class Lane:
    """One contender, ready to run, and its samples in seconds per step, one for each round."""

    name: str
    step: Step
    restore: Callable[[], None] = _nothing  # runs after each sample, untimed
    steps_per_sample: int = 1
    rounds: int = sys.maxsize  # takes part in no more than the first so many
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)  # where it is told apart

    def take(self, timer: Timer) -> None:
        sample = timer(self.step, self.steps_per_sample)
        self.seconds.append(sample.seconds)
        if sample.host is not None:
            self.host.append(sample.host)
        self.restore()

    def close(self) -> None:
        """Let go of the optimizer and its state."""
        self.step = self.restore = _nothing


def run_rounds(
    lanes: Sequence[Lane],
    repeats: int,
    timer: Timer,
    *,
    sample_seconds: float = 0.01,
    lane_seconds: float = math.inf,
    warmup: int = 2,
    seed: int = 0,
    tick: Callable[[], Any] = _nothing,
) -> None:
    """Warm every lane up, then take ``repeats`` rounds of samples.

    Within a round the machine is about as busy for all, so ratios within a round are what counts.
    The order is drawn anew each round, so that nobody always runs first, nor always after the
    same neighbour. Short steps are repeated until a sample takes ``sample_seconds``; a lane that
    would take more than ``lane_seconds`` in all drops out early, after three rounds at least.
    """
    for lane in lanes:
        spent = [_cost(timer(lane.step, 1))]  # allocates state, faults pages in, builds plans
        while len(spent) < warmup or (len(spent) < 20 and sum(spent) < sample_seconds):
            spent.append(_cost(timer(lane.step, 1)))
        per_step = max(min(spent[1:]), 1e-7)
        lane.steps_per_sample = min(1000, math.ceil(sample_seconds / per_step))
        if lane_seconds < math.inf:
            lane.rounds = max(3, int(lane_seconds / (per_step * lane.steps_per_sample)))
        lane.restore()
    draw = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for lane in draw.sample(lanes, len(lanes)):
                if turn < lane.rounds:
                    lane.take(timer)
                tick()
    finally:
        if collecting:
            gc.enable()


def _cost(sample: Sample) -> float:
    """About what a step takes of the benchmark's own time."""
    return sample.seconds + 2.5 * (sample.host or 0.0)


@dataclass(frozen=True)
class Spread:
    """Median and the 20% and 80% quantiles."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), cuts[0], cuts[3])


def ratios(lane: Lane, baseline: Lane, interleaved: bool = True) -> Spread:
    """How many times the baseline's step of the same round, or its median where there is none."""
    if interleaved:
        return Spread.of([a / b for a, b in zip(lane.seconds, baseline.seconds, strict=False)])
    return Spread.of([a / statistics.median(baseline.seconds) for a in lane.seconds])
