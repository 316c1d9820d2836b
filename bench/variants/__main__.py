"""Device time of a step of the CUDA engine under changes of its source that change no result.

    python -m bench.variants build             where nvcc is: .gpu/variants/NAME, half a minute each
    python -m bench.variants run --out v.txt   where a GPU is: all of them, seconds each

The changes are in ``variants.txt``. Without Python or torch a program starts in a second, so a GPU
that is there for minutes answers a dozen questions. A line of the result: variant, model, case,
distance between the passes in items, microseconds.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.progress import tqdm
from bench.shapes import shapes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = ROOT / ".gpu/variants"
FLAGS = "-std=c++17 -O3 -fmad=false -DLAYERLR_DIRECTIONS(X)=X(Momentum)X(Adam)".split()


class Change(NamedTuple):
    """Text of a file under csrc/ and what takes its place."""

    file: str
    old: str
    new: str


def read_variants() -> dict[str, list[Change]]:
    """Changes by the name of the variant."""
    variants: dict[str, list[Change]] = {}
    for block in (HERE / "variants.txt").read_text().split("\n\n")[1:]:
        head, *lines = block.strip().splitlines()
        name, *file = head.split()
        changes = variants.setdefault(name, [])
        if file:
            old, new = ("\n".join(x[1:] for x in lines if x[0] == sign) for sign in "-+")
            changes.append(Change(file[0], old, new))
    return variants


def change(sources: Path, changes: Sequence[Change]) -> None:
    """Apply changes to a copy of csrc/."""
    for file, old, new in changes:
        text = (sources / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"bench.variants: {file} has not one {old!r}: see variants.txt")
        (sources / file).write_text(text.replace(old, new))


def build(names: Sequence[str], arch: str) -> None:
    variants = read_variants()
    work = ROOT / "build/variants"
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in tqdm(names or variants, "build"):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", work)
        change(work, variants[name])
        source = [HERE / "step.cu", "-x", "cu", work / "cuda/schedule.cpp"]
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", TARGET / name]
        subprocess.run(["nvcc", *FLAGS, f"-I{work}", *source, *target], check=True)


def lines(name: str, model: str, args: argparse.Namespace) -> Iterator[str]:
    """What one program prints, each line with the names in front."""
    sizes = ROOT / f"build/variants-{model}.txt"
    sizes.parent.mkdir(exist_ok=True)
    sizes.write_text("".join(f"{math.prod(s)} {int(len(s) > 1)}\n" for s in shapes(model)))
    command = [TARGET / name, sizes, args.distances, str(args.rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for line in (done.stdout + done.stderr).splitlines():
        yield f"{name} {model} {line}"


def run(args: argparse.Namespace) -> None:
    names = args.names or sorted(path.name for path in TARGET.iterdir())
    with open(args.out, "w") if args.out else sys.stdout as out:
        for name in tqdm(names, "variants"):
            for model in args.models.split(","):
                for line in lines(name, model, args):
                    print(line, file=out, flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__.split("\n")[0])
    p.add_argument("what", choices=("build", "run"))
    p.add_argument("names", nargs="*", help="of variants; all unless given")
    p.add_argument("--arch", default="90", help="build: compute capability")
    p.add_argument("--models", default="vit_b,resnet50")
    p.add_argument("--distances", default="792,396,1584", help="items between the two passes")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--out", type=Path)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.what == "build":
        build(args.names, args.arch)
    else:
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
