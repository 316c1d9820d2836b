"""Device time of a step under each choice that changes no bit of its result.

    python -m bench.tune --models resnet50,vit_b,vit_l --out tune.json

All choices of one optimizer take turns, as contenders do in ``bench.step_time``. The default runs
twice: how far the second is from the first is what the others are to be read against.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import builds, memory, peers, record
from bench.measure import Case, make_params
from bench.timing import Lane, Spread, ratios, run_rounds, timer_for

#: of `layerlr.backends.cuda.tuning`; the numbers under "blocks" are for each multiprocessor
CHOICES: dict[str, tuple[Any, ...]] = {
    "distance": (132, 264, 528, 792, 1584, 2112, 4224),
    "blocks": (1, 2, 3),
}
DEFAULT: dict[str, dict[str, Any]] = {"default": {}, "default again": {}}
RULES = [(name, rule) for of in peers.OURS.values() for name, rule in of]


def choices(blocks: int) -> dict[str, dict[str, Any]]:
    """Arguments of `tuning` by name, the default first and once more."""
    found = dict(DEFAULT)
    for key, values in CHOICES.items():
        for value in values:
            chosen = int(value * blocks) if key == "blocks" else value
            found[f"{key} {chosen}"] = {key: chosen}
    return found


def held(choice: dict[str, Any]) -> AbstractContextManager:
    """What holds while a plan is built."""
    if not choice:
        return contextlib.nullcontext()
    from layerlr.backends.cuda import tuning

    return tuning(**choice)


def measure(
    params: list[Tensor], named: dict[str, dict[str, Any]], args: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one optimizer after the other."""
    timer = timer_for(torch.device(args.device))
    for name, rule in RULES:
        if time.monotonic() > args.end:
            return
        lanes = []
        for label, choice in named.items():
            optimizer = builds.ours(name, rule, args.backend)(params)
            with held(choice):
                optimizer.step()  # builds the plan, which keeps what it was built under
            lanes.append(Lane(label, optimizer.step))
        run_rounds(lanes, args.rounds, timer, sample_seconds=0.003)
        yield [
            {
                "case": f"{name} {rule}",
                "choice": lane.name,
                "ms": Spread.of(lane.seconds).median * 1e3,
                "ratio": ratios(lane, lanes[0]).median,
            }
            for lane in lanes
        ]


def run(args: argparse.Namespace, named: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows; printed and written as they are found."""
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for model in args.models:
            case = Case(model, "sgd", torch.device(args.device), getattr(torch, dtype), args.rounds)
            for found in measure(make_params(case), named, args):
                rows += [{"model": model, "dtype": dtype, **row} for row in found]
                default, again, *_ = found
                best = min(found, key=lambda row: row["ratio"])
                print(
                    f"{case.name} {default['case']}: {default['ms']:.4f} ms; again "
                    f"{again['ratio']:.3f}; best {best['choice']} {best['ratio']:.3f}",
                    flush=True,
                )
                if args.out:
                    record.write_json(args.out, rows)
    return rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    p.add_argument("--models", type=lambda text: text.split(","), default=["resnet50", "vit_b"])
    p.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32"])
    p.add_argument("--backend", default="cuda", help="of layerlr (default: cuda)")
    p.add_argument("--device", default="cuda", help="(default: cuda)")
    p.add_argument("--rounds", type=int, default=7, help="(default: 7)")
    p.add_argument("--seconds", type=float, default=120, help="begin nothing after so many")
    p.add_argument("--out", type=Path, help="a .json to write, anew after each optimizer")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.end = time.monotonic() + args.seconds
    blocks = 0
    if args.device.startswith("cuda"):
        blocks = torch.cuda.get_device_properties(args.device).multi_processor_count
    with memory.frozen():
        run(args, choices(blocks) if args.backend == "cuda" else DEFAULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
