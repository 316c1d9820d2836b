"""A few steps of every kind over small tensors, to be run under a memory or race checker.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.sanitize_step --blocks 4

With few blocks each of them has many tiles, as on layers too large for a checker.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from bench.small import CASES, Buffer, label, sizes, step


def grid(blocks: int) -> AbstractContextManager:
    """Within it, plans of the cuda backend are for a grid of so many blocks; 0: by the device."""
    if not blocks:
        return contextlib.nullcontext()
    from layerlr.backends.cuda import tuning

    return tuning(blocks=blocks)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.sanitize_step", description=__doc__.split("\n")[0]
    )
    p.add_argument("--backend", default="cuda", help="of layerlr (default: cuda)")
    p.add_argument("--device", default="cuda", help="(default: cuda)")
    p.add_argument("--shapes", default="small", help="small (default), large or a model")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--steps", type=int, default=2, help="(default: 2)")
    p.add_argument("--blocks", type=int, default=0, help="of the cuda backend's grid, at most")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    steps = 0
    for dtype in args.dtypes:
        buffer = Buffer(sizes(args.shapes), getattr(torch, dtype), args.device)
        for case in CASES:
            params = buffer.params()
            with grid(args.blocks):
                step(case, params, args.backend, args.steps)
            if not all(bool(p.isfinite().all()) for p in params):
                print(f"{dtype} {label(*case)}: a weight is not finite")
                return 1
            steps += args.steps
    print(f"{steps} steps over {args.shapes} tensors, backend {args.backend}: all weights finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
