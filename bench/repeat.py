"""Do steps repeat to the bit: run after run, on grids of any size, wherever the tensors lie?

python -m bench.repeat
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bench.small import CASES, Buffer, label, sizes, step

Case = tuple[str, str | None, dict]
# name, what holds while the optimizer is built and steps, elements the tensors are moved by
Variant = tuple[str, Callable[[], AbstractContextManager], int]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def variants(backend: str) -> list[Variant]:
    """What must change no bit."""
    found: list[Variant] = [("one element further on", contextlib.nullcontext, 1)]
    if backend == "cpu":
        found += [(f"{n} threads", lambda n=n: _threads(n), 0) for n in (2, 3)]
    elif backend == "cuda":
        from layerlr.backends.cuda import tuning

        choices = [{"blocks": n} for n in (1, 2, 13, 64)]
        choices += [{"distance": 1}, {"distance": 10**6}, {"blocks": 13, "distance": 2}]
        found += [(str(choice), lambda c=choice: tuning(**c), 0) for choice in choices]
    return found


def bits(case: Case, buffer: Buffer, backend: str, steps: int, shift: int = 0) -> Tensor:
    """Weights and state after a few steps, as bytes."""
    params = buffer.params(shift)
    state = step(case, params, backend, steps).state
    kept = [*params, *(s for p in params for s in state[p].values() if isinstance(s, Tensor))]
    device = params[0].device
    return torch.cat([t.detach().to(device).flatten().view(torch.uint8) for t in kept])


def differing(case: Case, buffer: Buffer, backend: str, runs: int, steps: int) -> list[str]:
    """The runs and variants whose bits are not the first run's."""
    first = bits(case, buffer, backend, steps)
    wrong = [
        f"run {turn}"
        for turn in range(1, runs)
        if not torch.equal(first, bits(case, buffer, backend, steps))
    ]
    for name, held, shift in variants(backend):
        with held():
            if not torch.equal(first, bits(case, buffer, backend, steps, shift)):
                wrong.append(name)
    return wrong


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.repeat", description=__doc__.split("\n")[0])
    p.add_argument("--backend", default="cuda", help="of layerlr (default: cuda)")
    p.add_argument("--device", default="cuda", help="(default: cuda)")
    p.add_argument("--shapes", nargs="+", default=["small", "large", "resnet50"])
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--runs", type=int, default=20, help="(default: 20)")
    p.add_argument("--steps", type=int, default=3, help="of each run (default: 3)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    checked = failed = 0
    for name in args.shapes:
        for dtype in args.dtypes:
            buffer = Buffer(sizes(name), getattr(torch, dtype), args.device)
            for case in CASES:
                wrong = differing(case, buffer, args.backend, args.runs, args.steps)
                checked, failed = checked + 1, failed + bool(wrong)
                if wrong:
                    print(f"DIFFERS {name} {dtype} {label(*case)}: {', '.join(wrong)}")
    print(
        f"{checked - failed} of {checked} the same to the bit over {args.runs} runs and "
        + "; ".join(name for name, _, _ in variants(args.backend))
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
