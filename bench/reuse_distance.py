"""How far apart the CUDA engine's two visits to an element are.

``python -m bench.reuse_distance``. Under a rule each element is visited twice, once to measure,
once to apply. What the first visit read can come from the L2 cache at the second if few bytes were
touched in between. They are counted here from the engine's own schedule
(``csrc/cuda/schedule.cpp``, compiled into a small program), without a GPU: bytes in the order in
which items are given out. Blocks work on some 264 items at a time, and what a cache does with such
distances is another matter: csrc/README.md, decision 13.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.shapes import shapes

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("resnet50", "vit_b", "vit_l", "gpt2_xl", "llama3_8b")
#: bytes that the two visits to an element touch, in float32 (docs/speed.md)
BYTES = {
    "SGD, singh": (4, 20),
    "SGD, lars": (8, 20),
    "SGD, layca": (16, 12),
    "Adam, layca or lamb": (24, 16),
}
#: what an H100's or an H200's L2 serves at the least: half of it, of 50 MB
NEAR = 20e6


def schedule(sizes: Sequence[int], multiprocessors: int = 132, distance: int = 0) -> np.ndarray:
    """Rows of a step's second visits: elements; elements of first, of second visits in between.

    ``distance``: items between a layer's two passes, 0 for the engine's own choice.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "reuse_distance")
        sources = [ROOT / "csrc/cuda/schedule.cpp", Path(__file__).with_suffix(".cpp")]
        command = [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            "-O2",
            f"-I{ROOT / 'csrc'}",
            *sources,
        ]
        subprocess.run([*map(str, command), "-o", str(program)], check=True)
        numbers = "\n".join(map(str, sizes))
        ran = subprocess.run(
            [program, str(multiprocessors), str(distance)],
            input=numbers,
            capture_output=True,
            text=True,
            check=True,
        )
    rows = [line.split() for line in ran.stdout.splitlines()]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def near(rows: np.ndarray, first: int, second: int, within: float = NEAR) -> tuple[float, float]:
    """Share of the elements whose visits are less than ``within`` bytes apart, median of bytes."""
    elements, distance = rows[:, 0], rows[:, 1] * first + rows[:, 2] * second
    order = np.argsort(distance)
    counted = np.cumsum(elements[order])
    median = distance[order][np.searchsorted(counted, counted[-1] / 2)]
    return float(elements[distance < within].sum() / elements.sum()), float(median)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench.reuse_distance", description=__doc__)
    p.add_argument("--models", default=",".join(MODELS))
    p.add_argument("--multiprocessors", type=int, default=132, help="an H100 or H200 has 132")
    p.add_argument("--distance", type=int, default=0, help="items; 0: the engine's choice")
    args = p.parse_args(argv)
    table = Table("model", *BYTES, title=f"elements read again within {NEAR / 1e6:g} MB; median")
    for model in args.models.split(","):
        sizes = [math.prod(shape) for shape in shapes(model)]
        rows = schedule(sizes, args.multiprocessors, args.distance)
        found = [near(rows, *pair) for pair in BYTES.values()]
        table.add_row(model, *(f"{share:.0%}; {far / 1e6:.0f} MB" for share, far in found))
    Console().print(table)


if __name__ == "__main__":
    main()
