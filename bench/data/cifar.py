"""CIFAR-10 and CIFAR-100 in their Python version, as torchvision keeps it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .base import DataError, Raw, below
from .pickles import load_pickle


def cifar10(folder: Path | None) -> Raw:
    """CIFAR-10 from FOLDER/cifar-10-batches-py or FOLDER."""
    base = below(folder, "cifar10", "cifar-10-batches-py")
    batches = [_batch(base / f"data_batch_{i}", "labels", 10) for i in range(1, 6)]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return Raw(images, labels, *_batch(base / "test_batch", "labels", 10), 10, 255.0)


def cifar100(folder: Path | None) -> Raw:
    """CIFAR-100, its fine labels, from FOLDER/cifar-100-python or FOLDER."""
    base = below(folder, "cifar100", "cifar-100-python")
    train, test = (_batch(base / part, "fine_labels", 100) for part in ("train", "test"))
    return Raw(*train, *test, 100, 255.0)


def _batch(path: Path, key: str, classes: int) -> tuple[Tensor, Tensor]:
    content = load_pickle(path)
    if not isinstance(content, dict) or not content.keys() >= {"data", key}:
        raise DataError(f"{path}: not a dict with 'data' and {key!r}")
    images, labels = content["data"], content[key]
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise DataError(f"{path}: 'data' is no array of bytes")
    if images.ndim != 2 or images.shape[1] != 3 * 32 * 32 or len(images) == 0:
        raise DataError(f"{path}: 'data' of shape {tuple(images.shape)}, not (items, 3072)")
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    if not isinstance(labels, list) or len(labels) != len(images):
        held = len(labels) if isinstance(labels, list) else "no list of"
        raise DataError(f"{path}: {held} labels for {len(images)} images")
    for item, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(f"{path}: label {label!r} at item {item}, not in 0..{classes - 1}")
    return images.view(-1, 3, 32, 32), torch.tensor(labels)
