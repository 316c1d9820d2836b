"""Interleaved timing: every round takes one sample of every contender, in an order of its own."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Timer = Callable[[Callable[[], Any], int], float]


def timer_for(device: torch.device, clock: str = "wall") -> Timer:
    """A function ``(step, n) -> seconds per step`` over n steps on ``device``.

    ``clock="cpu"`` counts the calling thread's processor time instead: for one thread on a
    machine that is busy with other work. Timing by device events is to be another branch here.
    """
    if device.type != "cpu":
        raise NotImplementedError(f"step_time has no timer for {device.type!r} yet, only for 'cpu'")
    now = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}[clock]

    def host(step: Callable[[], Any], n: int) -> float:
        start = now()
        for _ in range(n):
            step()
        return (now() - start) * 1e-9 / n

    return host


def _nothing() -> None:
    pass


@dataclass
class Lane:
    """One contender, ready to run, and its samples in seconds per step, one for each round."""

    name: str
    step: Callable[[], Any]
    restore: Callable[[], None] = _nothing  # runs after each sample, untimed
    steps_per_sample: int = 1
    seconds: list[float] = field(default_factory=list)


def run_rounds(
    lanes: Sequence[Lane],
    repeats: int,
    timer: Timer,
    *,
    sample_seconds: float = 0.01,
    warmup: int = 2,
    seed: int = 0,
    tick: Callable[[], None] = _nothing,
) -> None:
    """Warm every lane up, then take ``repeats`` rounds of samples.

    Within a round the machine is about as busy for all, so ratios within a round are what counts.
    The order is drawn anew each round, so that nobody always runs first, nor always after the
    same neighbour. Short steps are repeated until a sample takes ``sample_seconds``.
    """
    for lane in lanes:
        spent = [timer(lane.step, 1)]  # allocates state, faults pages in, builds plans
        while len(spent) < warmup or (len(spent) < 20 and sum(spent) < sample_seconds):
            spent.append(timer(lane.step, 1))
        per_step = min(spent[1:])
        lane.steps_per_sample = min(1000, math.ceil(sample_seconds / max(per_step, 1e-7)))
        lane.restore()
    draw = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            order = draw.sample(lanes, len(lanes))
            for lane in order:
                lane.seconds.append(timer(lane.step, lane.steps_per_sample))
                lane.restore()
                tick()
    finally:
        if collecting:
            gc.enable()


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


def ratios(lane: Lane, baseline: Lane) -> Spread:
    """How many times the baseline's step of the same round."""
    return Spread.of([a / b for a, b in zip(lane.seconds, baseline.seconds, strict=True)])
