"""A few steps of every kind over small tensors, to be run under a memory or race checker.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.sanitize_step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.small import CASES, Buffer, label, sizes, step


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.sanitize_step", description=__doc__.split("\n")[0]
    )
    p.add_argument("--backend", default="cuda", help="of layerlr (default: cuda)")
    p.add_argument("--device", default="cuda", help="(default: cuda)")
    p.add_argument("--shapes", default="small", help="small (default), large or a model")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--steps", type=int, default=2, help="(default: 2)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    steps = 0
    for dtype in args.dtypes:
        buffer = Buffer(sizes(args.shapes), getattr(torch, dtype), args.device)
        for case in CASES:
            params = buffer.params()
            step(case, params, args.backend, args.steps)
            if not all(bool(p.isfinite().all()) for p in params):
                print(f"{dtype} {label(*case)}: a weight is not finite")
                return 1
            steps += args.steps
    print(f"{steps} steps over {args.shapes} tensors, backend {args.backend}: all weights finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
