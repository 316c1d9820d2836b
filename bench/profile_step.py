"""One step of each optimizer within a profiler's range, and nothing else in it.

    ncu --profile-from-start off --nvtx --clock-control none --csv --page raw --log-file ncu.csv \\
        --metrics dram__bytes_read.sum,dram__bytes_write.sum python -m bench.profile_step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench import builds, peers
from bench.measure import Case, make_params
from bench.shapes import MODELS


def contenders(backends: Sequence[str]) -> list[tuple[str, builds.Build]]:
    """Torch's fused steps, and ours under each rule."""
    found = [
        ("torch SGD fused", builds.torch_sgd(fused=True)),
        ("torch AdamW fused", builds.torch_adamw(fused=True)),
    ]
    for backend in backends:
        for family in peers.OURS.values():
            found += [(f"{n} {r} {backend}", builds.ours(n, r, backend)) for n, r in family]
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.profile_step", description=__doc__.split("\n")[0]
    )
    p.add_argument("--models", nargs="+", default=["resnet50", "vit_b"], choices=MODELS)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--backends", nargs="+", default=["cuda"], help="of layerlr (default: cuda)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = torch.device("cuda")
    for model in args.models:
        params = make_params(Case(model, "sgd", device, getattr(torch, args.dtype), 1))
        for name, build in contenders(args.backends):
            optimizer = build(params)
            for _ in range(2):  # the state, the plan
                optimizer.step()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_push(f"{model} {name}")
            torch.cuda.profiler.start()
            optimizer.step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            torch.cuda.nvtx.range_pop()
            print(f"{model} {name}: {MODELS[model][2]} parameters", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
