"""Data sets: a name and, where it does not come with a package, a folder -> tensors.

Each reader returns `Raw` arrays as stored on disk, which `load` turns into float inputs, or `Data`
that is ready. A new data set is one function and one line in `DATASETS`. Nothing is downloaded,
and pickles are read without executing anything (`pickles`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .base import Data, DataError, Raw
from .cifar import cifar10, cifar100
from .folders import imagenet, tiny_imagenet
from .mnist import digits, mnist, read_idx
from .planetoid import GraphData, cora
from .text import tiny_shakespeare

__all__ = ["DATASETS", "SCALINGS", "Data", "DataError", "GraphData", "Raw", "load", "read_idx"]

DATASETS: dict[str, Callable[[Path | None], Raw | Data]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "imagenet": imagenet,
    "cora": cora,
    "tiny_shakespeare": tiny_shakespeare,
}
SCALINGS = ("standard", "unit", "centred")


def load(name: str, folder: str | Path | None = None, scaling: str = "standard") -> Data:
    """Read data set `name`.

    Parameters
    ----------
    scaling
        ``"standard"``: minus the mean, over the deviation, both scalars over the train set.
        ``"unit"``: pixels over full scale (MNIST: 1/256, as Caffe's LeNet has it).
        ``"centred"``: pixels minus the mean image of the train set, as Caffe's CIFAR-10 has it.
        A set that comes as `Data` (imagenet, cora, text) says in ``meta`` how it was scaled.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are: {', '.join(DATASETS)}")
    if scaling not in SCALINGS:
        raise DataError(f"unknown scaling {scaling!r}; there are: {', '.join(SCALINGS)}")
    raw = DATASETS[name](None if folder is None else Path(folder))
    if isinstance(raw, Data):
        return raw
    mean, std = _scale(raw, scaling)
    return Data(
        name,
        raw.images.float().sub_(mean).div_(std),
        raw.labels,
        raw.test_images.float().sub_(mean).div_(std),
        raw.test_labels,
        raw.classes,
        {
            "scaling": scaling,
            "mean": torch.as_tensor(mean, dtype=torch.float64).mean().item(),
            "std": std,
            "train": len(raw.images),
            "test": len(raw.test_images),
        },
    )


def _scale(raw: Raw, scaling: str) -> tuple[float | Tensor, float]:
    """What is subtracted from a pixel, and what it is divided by."""
    if scaling == "unit":
        return 0.0, raw.full_scale
    # In float64: a float32 sum over 47 million pixels is off in the fourth digit. And piece by
    # piece: all of Tiny ImageNet would take 10 GB.
    pieces = raw.images.split(4096)
    mean = sum((piece.double().sum(0) for piece in pieces), torch.tensor(0.0)) / len(raw.images)
    if scaling == "centred":
        return mean.float(), 1.0
    squares = sum(((piece.double() - mean.mean()) ** 2).sum().item() for piece in pieces)
    return mean.mean().item(), (squares / raw.images.numel()) ** 0.5
