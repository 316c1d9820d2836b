"""Which codes of 8 bits: AdamW on a character-level GPT, its moments coded after each step.

Ours (`layerlr.codes`), in blocks of 64 and of 128; the dynamic codes of Dettmers et al. 2022
(arXiv:2110.02861) in blocks of 64 and of 128; floats of 8 bits (4 bits of exponent, 3 or 4 of
mantissa) in blocks of 64; and float32. A plain loop over torch tensors, so that nothing but the
codes differs.

    python -m bench.papers.state_codes --data FOLDER --out bench/results/state_codes_cpu.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench import report
from bench.data import Data
from bench.data.text import tiny_shakespeare
from bench.record import write_json

from . import gpt

SMALL = 4096
LR, BETAS, EPS, DECAY = 4e-3, (0.9, 0.999), 1e-8, 0.1


def dynamic(signed: bool) -> Tensor:
    """What dynamic codes stand for: 7 decades, each with twice the codes of the last."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        of_decade = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += of_decade + ([-x for x in of_decade] if signed else [])
    return torch.tensor(sorted(found))


DYNAMIC = {signed: dynamic(signed) for signed in (True, False)}


def nearest(y: Tensor, signed: bool) -> Tensor:
    """The nearest dynamic code."""
    known = DYNAMIC[signed]
    i = torch.searchsorted(known, y.contiguous()).clamp(1, len(known) - 1)
    low, high = known[i - 1], known[i]
    return torch.where(y - low < high - y, low, high)


def small_float(y: Tensor, signed: bool) -> Tensor:
    """Rounded to a float of 8 bits whose largest is 1; what is there keeps the smallest."""
    bits = 3 if signed else 4
    top = 2 - 2.0**-bits
    a = y.abs() * top
    exponent = torch.floor(torch.log2(a.clamp(min=1e-30))).clamp(-15, 0)
    unit = 2.0 ** (exponent - bits)
    rounded = (a / unit).round() * unit
    if not signed:
        rounded = torch.where((rounded == 0) & (y > 0), torch.tensor(2.0 ** (-15 - bits)), rounded)
    return rounded.copysign(y) / top


def middle(z: Tensor, bits: int) -> Tensor:
    """The middle of the numbers that begin with the same bits."""
    mantissa, exponent = torch.frexp(z)
    return torch.where(z > 0, torch.ldexp((mantissa * 2**bits).floor() + 0.5, exponent - bits), z)


def ours(y: Tensor, signed: bool) -> Tensor:
    """The formula of `layerlr.codes`, for blocks of any size."""
    if signed:
        c = middle(y.abs() * 127.0**2, 16).sqrt().round()
        return (c / 127).square().copysign(y)
    c = middle(y * 255.0**4, 8).sqrt().sqrt().round()
    return (torch.where(y > 0, c.clamp(min=1), c) / 255) ** 4


KINDS: dict[str, tuple[Callable[[Tensor, bool], Tensor] | None, int]] = {
    "float32": (None, 0),
    "ours, 64": (ours, 64),
    "ours, 128": (ours, 128),
    "dynamic, 64": (nearest, 64),
    "dynamic, 128": (nearest, 128),
    "8-bit float, 64": (small_float, 64),
}


def coded(x: Tensor, kind: str, signed: bool) -> Tensor:
    code, block = KINDS[kind]
    if code is None or x.ndim < 2 or x.numel() < SMALL or x.shape[1] % block:
        return x
    blocks = x.reshape(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    y = torch.where(largest > 0, blocks / largest, 0.0)
    return (code(y, signed) * largest).reshape(x.shape)


def train(kind: str, data: Data, seed: int, steps: int, after_step: Callable[[], object]) -> float:
    """Validation loss after some steps."""
    torch.manual_seed(seed)
    model = gpt.GPT(data.shape, data.classes, width=128, depth=2)
    params = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    draw = torch.Generator().manual_seed(100 + seed)

    for t in range(1, steps + 1):
        model.zero_grad()
        chosen = torch.randint(len(data.x), (16,), generator=draw)
        gpt.loss(model(data.x[chosen]), data.y[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        lr = LR * min(1, t / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * t / steps)))
        with torch.no_grad():
            for k, p in enumerate(params):
                m, v, g = *moments[k], p.grad
                assert g is not None
                m = coded(m * BETAS[0] + g * (1 - BETAS[0]), kind, True)
                v = coded(v * BETAS[1] + g * g * (1 - BETAS[1]), kind, False)
                moments[k] = m, v
                root = (v / (1 - BETAS[1] ** t)).sqrt() + EPS
                p.mul_(1 - lr * DECAY * (p.ndim >= 2))
                p.sub_(lr * (m / (1 - BETAS[0] ** t)) / root)
        after_step()
    with torch.no_grad():
        return float(gpt.loss(model(data.test_x), data.test_y))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = tiny_shakespeare(options.data)
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tqdm(total=len(KINDS) * options.seeds * options.steps, unit="step") as bar:
        for seed in range(options.seeds):
            for kind in KINDS:
                bar.set_description(f"{kind}, seed {seed}")
                losses[kind].append(train(kind, data, seed, options.steps, bar.update))
    command = "python -m bench.papers.state_codes --data FOLDER"
    command += f" --steps {options.steps} --seeds {options.seeds}"
    facts = report.machine_facts(torch.device("cpu"), "wall", [command])
    write_json(options.out, {"machine": facts, "losses": losses})
    for kind, values in losses.items():
        print(f"{kind:16} {sum(values) / len(values):.4f}", *(f"{x:.4f}" for x in values))


if __name__ == "__main__":
    main()
