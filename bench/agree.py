"""Does an engine take the steps that the reference takes, on layers as large as a model's?

    python -m bench.agree                                       small, large and ResNet-50's shapes
    python -m bench.agree --backend cpu --device cpu --shapes small

Both step from the same weights, gradients and state; the reference does so on the CPU, where it
fuses no multiplication into an addition. Weights may differ by 2 units in the last place of the
larger of the weight before and after (float64: 16), without a rule by nothing. The tests hold
engines to the same, on layers of a few tiles; this sees layers that a block keeps on the chip,
layers of many blocks, and layers that are read again.

The last line counts. Exit status: 0, all that was tried agrees; 1, some does not; 2, nothing does,
or the device was lost.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.small import CASES, Buffer, label, sizes, step
from layerlr.agreement import bound, difference
from layerlr.devices import lost


def differs(case: tuple, buffer: Buffer, backend: str, device: torch.device, steps: int) -> float:
    """Step both; the reference goes on from the engine's weights and state, whatever they are."""
    ours, theirs = buffer.params(), buffer.params()
    for p in ours:
        grad, p.grad = p.grad, None
        p.data = p.data.to(device)
        assert grad is not None
        p.grad = grad.to(device)
    mine, other = step(case, ours, backend, 0), step(case, theirs, "reference", 0)
    return difference(mine, other, steps)


def verdicts(args: argparse.Namespace) -> Iterator[bool]:
    """Whether each case agrees, said as well; ends early for want of time or of the device."""
    for name in args.shapes:
        for dtype in args.dtypes:
            buffer = Buffer(sizes(name), getattr(torch, dtype), "cpu")
            for case in CASES:
                if time.monotonic() > args.end:
                    return
                # before the step: where it hangs, this is what is left of it
                print(f"{name} {dtype} {label(*case)}:", end=" ", flush=True)
                try:
                    most = differs(case, buffer, args.backend, args.device, args.steps)
                except Exception as error:
                    print(f"FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    yield False
                    if lost(args.device):
                        return
                    continue
                good = most <= bound(case[1] is not None, buffer.weights.dtype)
                print(f"{'' if good else 'WRONG: '}{most:g} ulp", flush=True)
                yield good


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.agree", description=__doc__.split("\n")[0])
    p.add_argument("--backend", default="cuda", help="of layerlr (default: cuda)")
    p.add_argument("--device", type=torch.device, default="cuda", help="(default: cuda)")
    p.add_argument("--shapes", nargs="+", default=["small", "large", "resnet50"])
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--steps", type=int, default=2, help="of each case (default: 2)")
    p.add_argument(
        "--seconds", type=float, default=math.inf, help="begin nothing after so many seconds"
    )
    p.add_argument("--threads", type=int, default=1, help="of the reference (default: 1)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args: Any = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    args.end = time.monotonic() + args.seconds
    found = list(verdicts(args))
    planned = len(args.shapes) * len(args.dtypes) * len(CASES)
    print(
        f"backend {args.backend}: {sum(found)} of {len(found)} agree with the reference"
        + (f", {planned - len(found)} not tried" if len(found) < planned else "")
        + (", THE DEVICE WAS LOST" if lost(args.device) else "")
    )
    return 2 if not any(found) or lost(args.device) else min(found.count(False), 1)


if __name__ == "__main__":
    sys.exit(main())
