"""The papers' experiments, one after the other, in order of what they are worth.

``python -m bench.papers.run_all --scale cpu --data FOLDER`` goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from . import (
    backmatching_vgg,
    char_gpt,
    char_gpt_norms,
    curvature_autoencoder,
    curvature_cnn,
    curvature_gcn,
    curvature_line,
    layca_adaptive,
    layca_alpha,
    layca_toy,
    singh_cifar10,
    singh_mnist,
)
from .runner import parser_of

QUEUE = (
    (layca_alpha, ()),
    (singh_mnist, ()),
    (layca_toy, ()),
    (layca_toy, ("--frozen-feedback",)),
    (curvature_gcn, ()),
    (curvature_autoencoder, ()),
    (layca_adaptive, ()),
    (backmatching_vgg, ()),
    (singh_cifar10, ()),
    (singh_cifar10, ("--step-down", "50000")),
    (curvature_cnn, ()),
    (curvature_line, ()),
    (curvature_line, ("--autoencoder",)),
    (char_gpt, ()),
    (char_gpt_norms, ()),
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser_of(__doc__, "cpu").parse_args(argv)
    given = ["--data", str(options.data), "--out", str(options.out), "--scale", options.scale]
    given += ["--quick"] * options.quick
    for module, more in tqdm(QUEUE, unit="experiment"):
        module.run([*given, *more])


if __name__ == "__main__":
    main()
