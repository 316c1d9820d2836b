"""One page in Markdown on a run of ``bench.step_time``: machine, goals, roofline, step times.

python -m bench.summary gpu.json gpu.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import goals, record, report, roofline

FACTS = ("gpu", "memory_gib", "l2_mib", "cuda", "cpu", "threads", "python", "torch", "triton")
MORE = ("layerlr", "timm", "pytorch_optimizer", "commit", "command")


def page(result: report.Result) -> str:
    """The page, as far as the run has what it shows."""
    machine = result.machine
    facts = [f"{key} {machine[key]}" for key in (*FACTS, *MORE) if machine.get(key)]
    parts = [f"# Step times: {machine.get('gpu', machine['cpu'])}", "; ".join(facts)]
    if result.verdicts:
        parts += ["## Goals", "\n".join(f"- {line}" for line in goals.lines(result.verdicts))]
    copy = goals.copy_speed(result.rows)
    points = roofline.points(result.rows, copy) if copy else []
    if points:
        parts += ["## Share of a copy's bandwidth", f"The copy moves {copy:,.0f} GB/s."]
        parts.append(roofline.table(points, markdown=True))
    parts.append("## Step times")
    for model, dtype in dict.fromkeys((row.model, row.dtype) for row in result.rows):
        rows = [row for row in result.rows if (row.model, row.dtype) == (model, dtype)]
        parts += [f"### {model}, {dtype}", report.table(rows, markdown=True)]
    if result.left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in report.left_out(result))]
    return "\n\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.summary", description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path, help="a .json of bench.step_time")
    p.add_argument("page", type=Path, help="a .md to write")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    text = page(report.read(args.run))
    record.write_atomically(args.page, lambda file: file.write(text.encode()))
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
