"""Handwritten digits: scikit-learn's, and MNIST from idx files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .base import DataError, Raw


def digits(folder: Path | None) -> Raw:
    """1,797 real handwritten digits of 8x8 that come with scikit-learn.

    The file is ordered by writer, so the last third holds writers the training never saw: a
    harder and more telling test than a shuffled split, on which most optimizers reach about 1%.
    """
    if folder is not None:
        raise DataError(f"digits come with scikit-learn and take no folder (given: {folder})")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    cut = 1200
    return Raw(images[:cut], labels[:cut], images[cut:], labels[cut:], 10, 16.0)


def mnist(folder: Path | None) -> Raw:
    """MNIST (or anything in its format) from FOLDER/MNIST/raw, FOLDER/raw or FOLDER."""
    if folder is None:
        raise DataError(
            "mnist needs a folder that holds MNIST/raw/train-images-idx3-ubyte[.gz] ..."
        )
    train, train_labels = _idx_pair(folder, "train")
    test, test_labels = _idx_pair(folder, "t10k")
    return Raw(train, train_labels, test, test_labels, 10, 256.0)


# --- idx files, the format of MNIST: 0 0 type ndim, ndim big-endian uint32 sizes, the bytes ---

_UNSIGNED_BYTE = 8
_PIECE = 1 << 20


def read_idx(path: Path, ndim: int) -> Tensor:
    """One idx file of unsigned bytes, gzipped or not; anything but a whole file is a DataError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read_idx(file, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_idx(file: BinaryIO | gzip.GzipFile, path: Path, ndim: int) -> Tensor:
    magic = file.read(4)
    if magic != bytes((0, 0, _UNSIGNED_BYTE, ndim)):
        expected = bytes((0, 0, _UNSIGNED_BYTE, ndim)).hex()
        raise DataError(f"{path}: not an idx file of bytes: begins {magic.hex()}, not {expected}")
    header = file.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise DataError(f"{path}: truncated within the header")
    sizes = [int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(ndim)]
    promised = math.prod(sizes)
    # Piece by piece, so that a header which promises exabytes allocates no more than the file has.
    content = bytearray()
    while len(content) <= promised and (piece := file.read(_PIECE)):
        content += piece
    if len(content) != promised:
        state = "truncated" if len(content) < promised else "too long"
        held = len(content) if len(content) < promised else f"more than {promised}"
        raise DataError(
            f"{path}: {state}: the header promises {promised} bytes, the file holds {held}"
        )
    if promised == 0:
        raise DataError(f"{path}: holds no items (sizes {sizes})")
    return torch.frombuffer(content, dtype=torch.uint8).view(sizes)


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    image_path = _find(folder, f"{part}-images-idx3-ubyte")
    label_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{image_path}: images of {tuple(images.shape[1:])}, not (28, 28)")
    if len(images) != len(labels):
        raise DataError(
            f"{label_path}: {len(labels)} labels for {len(images)} images in {image_path}"
        )
    if labels.max() > 9:
        where = int((labels > 9).nonzero()[0])
        raise DataError(f"{label_path}: label {int(labels[where])} at item {where}, not in 0..9")
    return images.unsqueeze(1), labels.long()


def _find(folder: Path, stem: str) -> Path:
    tried = [
        base / (stem + suffix)
        for base in (folder / "MNIST" / "raw", folder / "raw", folder)
        for suffix in ("", ".gz")
    ]
    for path in tried:
        if path.is_file():
            return path
    raise DataError(f"no {stem}[.gz] in {folder}; looked for {', '.join(map(str, tried))}")
