"""The papers' experiments, one after the other, in order of what they are worth.

``python -m bench.papers.run_all --scale cpu --data FOLDER`` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from . import (
    backmatching_vgg,
    curvature_autoencoder,
    curvature_gcn,
    layca_adaptive,
    layca_alpha,
    layca_toy,
    singh_mnist,
)
from .runner import SCALES

QUEUE = (
    (layca_alpha, ()),
    (singh_mnist, ()),
    (layca_toy, ()),
    (layca_toy, ("--frozen-feedback",)),
    (curvature_gcn, ()),
    (curvature_autoencoder, ()),
    (layca_adaptive, ()),
    (backmatching_vgg, ()),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="folder of the data sets")
    add("--out", type=Path, default=Path("runs/papers"), help="folder for what is written")
    add("--scale", choices=SCALES, default="cpu", help="as published, or sized to a CPU core")
    add("--quick", action="store_true", help="a rehearsal of a few minutes, no measurement")
    options = parser.parse_args(argv)
    given = ["--data", str(options.data), "--out", str(options.out), "--scale", options.scale]
    given += ["--quick"] * options.quick
    for module, more in tqdm(QUEUE, unit="experiment"):
        module.run([*given, *more])


if __name__ == "__main__":
    main()
