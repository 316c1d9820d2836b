"""One family of contenders on one model: set up, timed in turn, turned into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import BASELINES, STREAM_IN_PLACE, Contender, Stepper, Stream
from bench.report import Row
from bench.shapes import shapes
from bench.timing import Lane, Spread, ratios, run_rounds, timer_for


@dataclass(frozen=True)
class Case:
    """What is run: everything but the contenders."""

    model: str
    family: str
    device: torch.device
    dtype: torch.dtype
    repeats: int
    clock: str


@dataclass(frozen=True)
class Entry:
    contender: Contender
    stepper: Stepper
    lane: Lane


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
        return Entry(contender, stepper, lane)

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
    return Entry(contender, stepper, lane)


def measure(
    case: Case,
    chosen: Sequence[Contender],
    left_out: dict[str, str],
    tick: Callable[[], None],
) -> list[Row]:
    """Rows of all the chosen contenders; those that fail go to ``left_out`` with the reason.

    They share weights and gradients and keep a state each: GPT-2 under a dozen Adams then fits in
    16 GiB, and luck with physical pages is shared too.
    """
    params = make_params(case)
    grads: list[Tensor] = []
    if any(contender.writes_grad for contender in chosen):
        grads = [p.grad.clone() for p in params if p.grad is not None]
    entries: list[Entry] = []
    for contender in chosen:
        try:
            entries.append(_prepare(contender, params, grads))
        except Exception as error:
            left_out[f"{case.model}: {contender.name}"] = f"{type(error).__name__}: {error}"
    lanes = [entry.lane for entry in entries]
    timer = timer_for(case.device, case.clock)
    run_rounds(lanes, case.repeats, timer, tick=tick)
    if not all(bool(p.isfinite().all()) for p in params):
        left_out[f"{case.model}: all of {case.family}"] = "in the end a weight was not finite"
        return []
    return _rows(case, entries, params)


def _rows(case: Case, entries: Sequence[Entry], params: Sequence[Tensor]) -> list[Row]:
    by_name = {entry.contender.name: entry for entry in entries}
    baseline = by_name[BASELINES[case.family]].lane
    count = sum(p.numel() for p in params)
    stream = by_name.get(STREAM_IN_PLACE)
    stream_speed = _speed(stream, count, case.dtype) if stream else None

    def row(entry: Entry) -> Row:
        contender, lane = entry.contender, entry.lane
        seconds = Spread.of(lane.seconds)
        speed = _speed(entry, count, case.dtype)
        timed = not isinstance(entry.stepper, Stream)
        return Row(
            model=case.model,
            tensors=len(params),
            parameters=count,
            dtype=str(case.dtype).removeprefix("torch."),
            family=case.family,
            contender=contender.name,
            package=contender.package,
            rule=contender.rule,
            seconds=seconds,
            ratio=ratios(lane, baseline) if timed else None,
            bytes_per_param=contender.bytes_per_param(case.dtype),
            gb_per_s=speed,
            of_stream=speed / stream_speed if speed and stream_speed else None,
            us_per_tensor=seconds.median / len(params) * 1e6 if timed else None,
            rounds=len(lane.seconds),
            steps_per_sample=lane.steps_per_sample,
        )

    return [row(entry) for entry in entries]


def _speed(entry: Entry, count: int, dtype: torch.dtype) -> float | None:
    """GB/s at the bytes the design moves; None where that is unknown or too little to tell."""
    if isinstance(entry.stepper, Stream):
        moved = entry.stepper.bytes
    else:
        moved = (entry.contender.bytes_per_param(dtype) or 0) * count
    return moved / Spread.of(entry.lane.seconds).median / 1e9 if moved > 1e6 else None
