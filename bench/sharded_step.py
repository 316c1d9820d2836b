"""The step of sharded parameters: messages that are sent for it, and its time.

Parameters are DTensors sharded along dim 0, as fully_shard leaves them, with gradients to match.
Messages are counted by torch's CommDebugMode. Time is taken on one process of all, in rounds of all
contenders between barriers, of which the ratio to torch.optim.SGD (foreach, no norms) counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import layerlr
from bench import builds, record, report
from bench.timing import Spread

SCHEMA = 1
COUNTS = (1, 60, 300)
BASELINE = "torch SGD"
CONTENDERS: dict[str, Callable[[list[Tensor]], Any]] = {
    BASELINE: lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "layerlr SGD, lars": lambda p: layerlr.SGD(p, lr=0.1, momentum=0.9, rule="lars", adapt="all"),
    "layerlr SGD, layca": lambda p: layerlr.SGD(p, lr=0.1, momentum=0.9, rule="layca"),
    "layerlr AdamW, lamb": lambda p: layerlr.AdamW(p, lr=1e-3, rule="lamb", adapt="all"),
}
if importlib.util.find_spec("timm"):
    CONTENDERS |= {
        "timm Lars, foreach": builds.timm_lars(True),
        "timm Lars, loop": builds.timm_lars(False),
        "timm Lamb, foreach": builds.timm_lamb(True),
    }


def parameters(mesh: DeviceMesh, n: int, shape: Sequence[int]) -> list[Tensor]:
    """Sharded along dim 0, with gradients."""
    torch.manual_seed(0)
    params = []
    for _ in range(n):
        values = torch.randn(2, *shape, device=mesh.device_type)
        p, g = (distribute_tensor(x, mesh, [Shard(0)]) for x in values)
        params.append(torch.nn.Parameter(p))
        params[-1].grad = g
    return params


def messages(step: Callable[[], object]) -> int:
    """Collectives in a step."""
    with CommDebugMode() as seen:
        step()
    return int(seen.get_total_counts())


def contend(
    mesh: DeviceMesh, n: int, shape: Sequence[int], rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Messages and seconds of every contender; all processes must call it alike."""
    optimizers = {name: make(parameters(mesh, n, shape)) for name, make in CONTENDERS.items()}
    sent = {}
    for name, optimizer in optimizers.items():
        optimizer.step()  # makes state, and plans
        sent[name] = messages(optimizer.step)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                optimizer.step()
            if mesh.device_type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - start) / steps)
    return {
        name: {
            "messages": sent[name],
            "seconds": asdict(Spread.of(took)),
            "ratio": asdict(
                Spread.of([a / b for a, b in zip(took, seconds[BASELINE], strict=True)])
            ),
        }
        for name, took in seconds.items()
    }


def _process(rank: int, args: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    cuda = args["device"] == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=args["world"],
    )
    mesh = init_device_mesh(args["device"], (args["world"],))
    found = {
        str(n): contend(mesh, n, args["shape"], args["rounds"], args["steps"])
        for n in args["counts"]
    }
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(args: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Start the processes, and collect what the first of them found."""
    machine = report.machine_facts(torch.device(args["device"]), "wall", command)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (args, folder), args["world"])
        found = json.loads(Path(folder, "found").read_text())
    return {"schema": SCHEMA, "machine": machine, "case": args, "parameters": found}


def table(result: dict[str, Any]) -> str:
    lines = [("parameters", "contender", "messages", "ratio", "20-80%")]
    for n, found in result["parameters"].items():
        for name, row in found.items():
            ratio = row["ratio"]
            spread = f"{ratio['q20']:.2f}-{ratio['q80']:.2f}"
            lines.append((n, name, str(row["messages"]), f"{ratio['median']:.2f}", spread))
    return report.columns(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.sharded_step", description=__doc__)
    p.add_argument("--world", type=int, default=2, help="processes (default: 2)")
    p.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="of parameters")
    p.add_argument("--shape", type=int, nargs="+", default=(64, 64), help="of each (64 64)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="gloo or NCCL")
    p.add_argument("--rounds", type=int, default=9, help="of timing (default: 9)")
    p.add_argument("--steps", type=int, default=5, help="in a row, a round (default: 5)")
    p.add_argument("--out", type=Path, help="a .json to write")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    out = args.pop("out")
    if args["device"] == "cuda" and torch.cuda.device_count() < args["world"]:
        parser().error(f"{args['world']} processes want as many CUDA devices")
    if min(args["world"], args["rounds"], args["steps"], *args["counts"], *args["shape"]) < 1:
        parser().error("numbers must be at least 1")
    words = sys.argv[1:] if argv is None else argv
    result = run(args, ["python", "-m", "bench.sharded_step", *words])
    print(table(result))
    if out is not None:
        record.write_json(out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
