"""Time of ``opt.step()``: layerlr beside torch.optim, timm and pytorch_optimizer.

    python -m bench.step_time --models resnet50,vit_b,gpt2,tiny300,l2 --out step_time.json

How it measures and how to read what it prints: ``bench/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import goals, report
from bench.measure import Case, measure
from bench.peers import BASELINES, SLOW_MODEL, Contender, contenders
from bench.shapes import MODELS

DTYPES = ("float32", "float64", "bfloat16", "float16")
QUICK = r"timm La.. foreach|layerlr (SGD \w+|Adam layca|AdamW lamb)$|in place"


def choose(family: str, model: str, only: str | None, backend: str) -> list[Contender]:
    """The family's contenders whose name matches ``only``; its baseline always."""
    chosen = []
    for contender in contenders(family, backend):
        if contender.slow and model != SLOW_MODEL:
            continue
        if contender.name == BASELINES[family] or not only or re.search(only, contender.name):
            chosen.append(contender)
    return chosen


def run(
    models: Sequence[str],
    *,
    families: Sequence[str] = ("sgd", "adam"),
    dtype: str = "float32",
    device: str = "cpu",
    threads: int = 1,
    repeats: int = 15,
    clock: str = "wall",
    backend: str = "cpu",
    only: str | None = None,
    command: Sequence[str] = (),
) -> report.Result:
    """Measure, printing a table as soon as each model is done."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    result = report.Result(report.machine_facts(where, clock, command))
    plan = [
        (
            Case(model, family, where, getattr(torch, dtype), repeats, clock),
            choose(family, model, only, backend),
        )
        for model in models
        for family in families
    ]
    total = sum(len(chosen) for _, chosen in plan) * repeats
    with tqdm(total=total, unit="sample", leave=False, dynamic_ncols=True) as bar:
        for case, chosen in plan:
            bar.set_description(f"{case.model} {case.family}")
            rows = measure(case, chosen, result.left_out, bar.update)
            gc.collect()  # the optimizers and their state go before the next ones come
            result.rows += rows
            bar.total -= (len(chosen) - len(rows)) * repeats  # those left out
            if rows:
                bar.write(report.table(rows) + "\n")
    # What the goals are stated for.
    if dtype == "float32" and threads == 1 and backend in ("cpu", "auto"):
        verdicts = goals.verdicts(result.rows)
        result.verdicts = [v for v in verdicts if v["met"] is not None or not only]
    return result


def quick(out: Path | None = None) -> report.Result:
    """A quarter of a minute for the demo: ResNet-50's shapes, the main contenders, few rounds.

    Too few for a verdict on a busy machine, so it gives none.
    """
    command = ["python", "-m", "bench.step_time", "--quick"]
    result = run(["resnet50"], repeats=5, only=QUICK, command=command)
    result.verdicts = []
    finish(result, out)
    return result


def finish(result: report.Result, out: Path | None) -> None:
    """What stands below the tables: verdicts, who was left out, the file."""
    for verdict in result.verdicts:
        print(goals.line(verdict))
    for name, reason in result.left_out.items():
        print(f"left out {name}: {reason}")
    if out is not None:
        report.write(out, result)
        print(f"wrote {out}")


def _choices(known: Sequence[str], text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


def _out(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".json", ".csv"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .json nor in .csv")
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.step_time", description="Time of opt.step(), beside the peers'."
    )
    p.add_argument(
        "--models",
        type=lambda text: _choices(list(MODELS), text),
        default=list(MODELS),
        help=f"parameter shapes, of {','.join(MODELS)} (default: all)",
    )
    p.add_argument(
        "--families",
        type=lambda text: _choices(list(BASELINES), text),
        default=list(BASELINES),
        help="sgd, adam or both (default)",
    )
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", default="cpu", help="(default: cpu, the only one timed so far)")
    p.add_argument("--threads", type=int, default=1, help="of torch's (default: 1)")
    p.add_argument("--repeats", type=int, default=15, help="rounds (default: 15)")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the thread's processor time, for a busy machine and one thread",
    )
    p.add_argument("--backend", default="cpu", help="of layerlr (default: cpu)")
    p.add_argument("--only", help="contenders whose name matches this regular expression")
    p.add_argument("--out", type=_out, help="a .json (everything) or .csv (rows) to write")
    p.add_argument("--quick", action="store_true", help="15 s: resnet50, main contenders")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    out = args.pop("out")
    if args.pop("quick"):
        quick(out)
        return 0
    if args["threads"] > 1 and args["clock"] == "cpu":
        parser().error("--clock cpu sees one thread only")
    if args["threads"] > 1 and "OMP_WAIT_POLICY" not in os.environ:
        print("advice: OMP_WAIT_POLICY=passive, or spinning threads slow virtual machines down")
    command = ["python", "-m", "bench.step_time", *(sys.argv[1:] if argv is None else argv)]
    finish(run(args.pop("models"), **args, command=command), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
