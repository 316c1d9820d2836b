"""Several runs of ``bench.step_time`` as one, and what they found on one screen.

    python -m bench.merge build/a.json build/b.json --out gpu.json

The runs are of one machine, a process for each model, say. A row that a later run has again counts
as the later one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import goals, report


def merge(results: Sequence[report.Result]) -> report.Result:
    """Rows and omissions of all; facts of the machine from the first, with every command."""
    rows, left_out = {}, {}
    for result in results:
        rows |= {(r.model, r.dtype, r.family, r.contender): r for r in result.rows}
        left_out |= result.left_out
    machine = dict(results[0].machine)
    machine["command"] = "; ".join(str(result.machine.get("command")) for result in results)
    found = list(rows.values())
    # where another backend came first, it has the names that the goals are stated for
    judged = [row for row in found if row.backend in (None, "cuda", "reference")]
    return report.Result(machine, found, goals.gpu_verdicts(judged), left_out)


def screen(rows: Sequence[report.Row], dtype: str) -> str:
    """A line for each contender; for each model ms, ratio to torch's fused step, share of a copy.

    The share counts every operand read once and every result written once.
    """
    rows = [r for r in rows if r.dtype == dtype]
    copy = goals.copy_speed(rows)
    models = list(dict.fromkeys(r.model for r in rows))
    table = {(r.contender, r.model): _cell(r, copy) for r in rows}
    lines = [(dtype, *models)]
    for name in dict.fromkeys(r.contender for r in rows):
        lines.append((name, *(table.get((name, model), "") for model in models)))
    return report.columns(lines)


def _cell(row: report.Row, copy: float | None) -> str:
    if row.package == "memory":
        return f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s else ""
    share = goals.of_copy(row, copy, once=True) if row.parameters > 1e6 else None
    ratio = f" {row.ratio.median:.2f}" if row.ratio else ""
    return f"{row.seconds.median * 1e3:.3f}{ratio}" + (f" {share:.0%}" if share else "")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.merge", description=__doc__.split("\n")[0])
    p.add_argument("runs", type=Path, nargs="+", help="files of bench.step_time, in JSON")
    p.add_argument("--out", type=Path, help="a .json to write")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    result = merge([report.read(path) for path in args.runs])
    print("device time of a step in ms, times torch's fused step, share of a copy's bandwidth\n")
    for dtype in dict.fromkeys(row.dtype for row in result.rows):
        print(f"{screen(result.rows, dtype)}\n")
    for line in report.left_out(result):
        print(line)
    for part in goals.GPU_PARTS:
        print(goals.summary(part, result.verdicts))
    if args.out:
        report.write(args.out, result)


if __name__ == "__main__":
    main()
