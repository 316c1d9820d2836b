"""Time of ``opt.step()``: layerlr beside torch.optim, timm and pytorch_optimizer.

    python -m bench.step_time --models resnet50,vit_b,gpt2,tiny300,l2 --out step_time.json
    python -m bench.step_time --device cuda --dtype float32,bfloat16 --out gpu.json

How it measures and how to read what it prints: ``bench/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import builds, goals, memory, report
from bench.measure import Case, measure
from bench.peers import BASELINES, Contender, contenders
from bench.progress import tqdm
from bench.shapes import DEFAULTS, MODELS

DTYPES = ("float32", "float64", "bfloat16", "float16")
BACKENDS = {"cpu": "cpu", "cuda": "cuda,triton"}
QUICK = r"timm La.. foreach|layerlr (SGD \w+|Adam layca|AdamW lamb)$|in place"


def choose(
    family: str, model: str, only: str | None, backends: Sequence[str], device: str = "cpu"
) -> list[Contender]:
    """The family's contenders whose name matches ``only``; its baseline always."""
    chosen = []
    for contender in contenders(family, backends, device):
        if contender.models is not None and model not in contender.models:
            continue
        if contender.name == BASELINES[family] or not only or re.search(only, contender.name):
            chosen.append(contender)
    return chosen


def run(
    models: Sequence[str] | None = None,
    *,
    families: Sequence[str] = ("sgd", "adam"),
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    threads: int = 1,
    repeats: int = 15,
    clock: str = "wall",
    flush: bool | None = None,
    backend: str | None = None,
    only: str | None = None,
    seconds: float = math.inf,
    command: Sequence[str] = (),
    save: Callable[[report.Result], object] = lambda result: None,
) -> report.Result:
    """Measure; print a table and ``save`` what there is as soon as each model is done.

    Nothing is begun after ``seconds``.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # whose stream events are recorded on
    backend = backend or BACKENDS.get(where.type, "reference")
    deadline = time.monotonic() + seconds
    builds.load()
    result = report.Result(report.machine_facts(where, clock, command))
    plan = [
        (
            Case(model, family, where, getattr(torch, dtype), repeats, clock, flush, deadline),
            choose(family, model, only, backend.split(","), where.type),
        )
        for dtype in dtypes
        for model in models or DEFAULTS.get(where.type, ())
        for family in families
    ]
    total = sum(len(chosen) for _, chosen in plan) * repeats
    with memory.frozen(), tqdm(total=total, unit="sample", leave=False, dynamic_ncols=True) as bar:
        for case, chosen in plan:
            bar.set_description(f"{case.model} {case.family}")
            if time.monotonic() > deadline:
                result.left_out[case.label(f"all of {case.family}")] = "no time left"
                continue
            rows = measure(case, chosen, result.left_out, bar.update)
            gc.collect()  # the optimizers and their state go before the next ones come
            result.rows += rows
            bar.total -= (len(chosen) - len(rows)) * repeats  # those left out
            if rows:
                bar.write(f"{case.name}\n{report.table(rows)}\n")
            result.verdicts = verdicts(result, where, threads, backend, only)
            save(result)
    return result


def verdicts(
    result: report.Result, device: torch.device, threads: int, backend: str, only: str | None
) -> list[dict[str, object]]:
    """On the goals, where the run is of the kind that they are stated for."""
    if device.type == "cuda":
        return goals.gpu_verdicts(result.rows) if backend.startswith("cuda") else []
    if threads > 1 or backend not in ("cpu", "auto"):
        return []
    rows = [row for row in result.rows if row.dtype == "float32"]
    return [v for v in goals.verdicts(rows) if v["met"] is not None or not only]


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
    for line in goals.lines(result.verdicts):
        print(line)
    for line in report.left_out(result):
        print(line)
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
        help=f"parameter shapes, of {','.join(MODELS)} (default: those of interest on the device)",
    )
    p.add_argument(
        "--families",
        type=lambda text: _choices(list(BASELINES), text),
        default=["sgd", "adam"],
        help="of sgd, adam (default: both), held: 16-bit weights in every precision, coded: AdamW "
        "with state in fewer bits",
    )
    p.add_argument(
        "--dtype",
        dest="dtypes",
        type=lambda text: _choices(DTYPES, text),
        default=["float32"],
        help=f"of weights and gradients, of {','.join(DTYPES)} (default: float32)",
    )
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--threads", type=int, default=1, help="of torch's (default: 1)")
    p.add_argument("--repeats", type=int, default=15, help="rounds (default: 15)")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the thread's processor time, for a busy machine and one thread",
    )
    p.add_argument(
        "--flush",
        action=argparse.BooleanOptionalAction,
        help="empty a core's or a GPU's caches before each step (default: a GPU's)",
    )
    p.add_argument(
        "--backend", help=f"of layerlr (default: cpu; on a GPU {BACKENDS['cuda']})", metavar="NAMES"
    )
    p.add_argument(
        "--seconds", type=float, default=math.inf, help="begin nothing after so many seconds"
    )
    p.add_argument("--only", help="contenders whose name matches this regular expression")
    p.add_argument("--out", type=_out, help="a .json (everything) or .csv (rows) to write")
    p.add_argument("--quick", action="store_true", help="15 s: resnet50, main contenders")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    out = args.pop("out")
    if args.pop("quick"):
        if args["device"] != "cpu":
            parser().error("--quick is a run on the CPU")
        quick(out)
        return 0
    if args["threads"] > 1 and args["clock"] == "cpu":
        parser().error("--clock cpu sees one thread only")
    if args["threads"] > 1 and "OMP_WAIT_POLICY" not in os.environ:
        print("advice: OMP_WAIT_POLICY=passive, or spinning threads slow virtual machines down")
    if args["device"].startswith("cuda") and not torch.cuda.is_available():
        parser().error("no CUDA device")
    command = ["python", "-m", "bench.step_time", *(sys.argv[1:] if argv is None else argv)]
    result = run(
        args.pop("models"),
        **args,
        command=command,
        save=lambda result: report.write(out, result) if out else None,
    )
    finish(result, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
