"""How near a step comes to the speed of memory: its compulsory bytes over a copy's bandwidth.

    python -m bench.roofline gpu.json --out roofline.json --plot roofline.png
    python -m bench.roofline --quick                    # times a small model itself

Read-once bytes count every operand read once and every result written once: what can be had where a
layer stays on the chip between the two passes of its rule. Two-pass bytes count what the second
pass reads again. 100% is a large ``copy_``, its reads and writes counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import goals, record, report, step_time
from bench.peers import ONCE, OURS, TWO_PASS, Stream
from bench.shapes import MODELS
from bench.timing import Lane, Spread, run_rounds, timer_for

SCHEMA = 1
ONLY = r"fused$|^layerlr|memory copy"


@dataclass(frozen=True)
class Point:
    """One contender on one model, as shares of the copy's bandwidth."""

    model: str
    dtype: str
    family: str
    rule: str | None
    backend: str  # "torch": the baseline of the family, under no rule
    seconds: float
    once_bytes: int  # per parameter
    two_pass_bytes: int | None  # None: by no design
    once: float
    two_pass: float | None


def compulsory(dtype: torch.dtype) -> list[tuple[str, str | None, int, int]]:
    """(family, rule, read-once bytes, two-pass bytes) per parameter, state in float32 at least."""
    state = torch.promote_types(dtype, torch.float32)
    return [
        (
            family,
            rule,
            ONCE[family].bytes_per_param(dtype, state),
            TWO_PASS[family, rule].bytes_per_param(dtype, state),
        )
        for family, variants in OURS.items()
        for _, rule in variants
    ]


def copy_speed(device: torch.device, repeats: int = 10) -> float:
    """GB/s of a large copy, reads and writes counted: the median."""
    stream = Stream("copy", torch.float32, device)
    lane = Lane("copy", stream.step)
    run_rounds([lane], repeats, timer_for(device))
    return stream.bytes / Spread.of(lane.seconds).median / 1e9


def points(rows: Sequence[report.Row], copy: float) -> list[Point]:
    """Of the rows whose compulsory bytes are known, and are enough to be of memory at all."""
    found = []
    for row in rows:
        once = goals.of_copy(row, copy, once=True)
        if once is None or row.parameters < 1e6 or row.contender.endswith("(A/A)"):
            continue
        facts = (row.model, row.dtype, row.family, row.rule, row.backend or row.package)
        moved = (row.once_bytes_per_param, row.bytes_per_param)
        shares = (once, goals.of_copy(row, copy, once=False))
        found.append(Point(*facts, row.seconds.median, *moved, *shares))
    return found


def table(found: Sequence[Point], markdown: bool = False) -> str:
    """A line for each model, rule and backend."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{share:.0%}"

    lines = [("", "rule", "backend", "ms/step", "B once", "of copy", "B two-pass", "of copy")]
    for p in found:
        name = f"{p.model} {p.family}" + ("" if p.dtype == "float32" else f" {p.dtype}")
        cells = (p.rule or "none", p.backend, f"{p.seconds * 1e3:.3f}")
        moved = str(p.two_pass_bytes or "")
        lines.append((name, *cells, str(p.once_bytes), percent(p.once), moved, percent(p.two_pass)))
    return report.columns(lines, markdown)


def analyse(result: report.Result, device: torch.device | None = None) -> dict[str, Any]:
    """What is written as JSON; the copy is that of the run, or measured now on ``device``."""
    copy = goals.copy_speed(result.rows)
    if copy is None:
        if device is None:
            raise ValueError("the run timed no 'memory copy': repeat it with it, or name a device")
        copy = copy_speed(device)
    dtypes = dict.fromkeys(row.dtype for row in result.rows)
    return {
        "schema": SCHEMA,
        "machine": result.machine,
        "copy_gb_per_s": copy,
        "bytes": [[d, *line] for d in dtypes for line in compulsory(getattr(torch, d))],
        "points": [asdict(point) for point in points(result.rows, copy)],
    }


def measure(args: argparse.Namespace) -> report.Result:
    """Time the steps here, for want of a run's file."""
    models, repeats = (["l2"], 2) if args.quick else (args.models, args.repeats)
    command = ["python", "-m", "bench.roofline", *sys.argv[1:]]
    how = {"device": args.device or "cpu", "dtypes": args.dtypes, "backend": args.backend}
    return step_time.run(models, repeats=repeats, only=ONLY, command=command, **how)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n")[0])
    p.add_argument("run", nargs="?", type=Path, help="a .json of bench.step_time (default: time)")
    p.add_argument("--device", help="to time on, or only the copy (default: cpu, or the file's)")
    p.add_argument("--models", type=lambda text: text.split(","), help=f"of {','.join(MODELS)}")
    p.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32"])
    p.add_argument("--backend", help="of layerlr, see bench.step_time")
    p.add_argument("--repeats", type=int, default=9, help="rounds (default: 9)")
    p.add_argument("--quick", action="store_true", help="one small model, two rounds")
    p.add_argument("--out", type=Path, help="a .json to write")
    p.add_argument("--plot", type=Path, help="a .png, .svg or .pdf to draw")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    result = report.read(args.run) if args.run else measure(args)
    content = analyse(result, torch.device(args.device) if args.device else None)
    found = [Point(**point) for point in content["points"]]
    print(table(found) if found else "no step whose compulsory bytes are known")
    print(f"copy: {content['copy_gb_per_s']:.0f} GB/s")
    if args.out:
        text = json.dumps(report.rounded(content), indent=1) + "\n"
        record.write_atomically(args.out, lambda file: file.write(text.encode()))
        print(f"wrote {args.out}")
    if args.plot and found:
        try:
            from bench.plot_roofline import plot
        except ImportError as error:
            print(f"no plot drawn: {error}")
        else:
            print(f"wrote {plot(found, content, args.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
