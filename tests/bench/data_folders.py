"""Tiny data sets in the layouts that people have them in."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest


def idx(sizes: tuple[int, ...], content: bytes, magic: bytes | None = None) -> bytes:
    magic = bytes((0, 0, 8, len(sizes))) if magic is None else magic
    return magic + struct.pack(f">{len(sizes)}I", *sizes) + content


def mnist_folder(base: Path, zipped: bool = True, **replaced: bytes) -> Path:
    """A tiny data set in MNIST's format: 6 images to learn from, 4 to test on."""
    base.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = bytes(i % 251 for i in range(count * 784))
        files = {
            f"{part}-images-idx3-ubyte": idx((count, 28, 28), pixels),
            f"{part}-labels-idx1-ubyte": idx((count,), bytes(range(count))),
        }
        for stem, content in files.items():
            content = replaced.get(stem.split("-idx")[0].replace("-", "_"), content)
            if zipped:
                (base / f"{stem}.gz").write_bytes(gzip.compress(content))
            else:
                (base / stem).write_bytes(content)
    return base


def cifar10_folder(base: Path, per_batch: int = 4) -> Path:
    """Random images; batch b begins with label b."""
    folder = base / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = random.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [(b + i) % 10 for i in range(per_batch)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}, 2))
    return base


def cifar100_folder(base: Path, items: int = 6) -> Path:
    folder = base / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("train", "test"):
        pixels = random.integers(0, 256, (items, 3072), dtype=np.uint8)
        fine = [(17 * i) % 100 for i in range(items)]
        content = {"data": pixels, "fine_labels": fine, "coarse_labels": [0] * items}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    return base


def image(path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow writes the images")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new("RGB", size, colour).save(path, quality=95)


def tiny_imagenet_folder(base: Path) -> Path:
    folder, names = base / "tiny-imagenet-200", ("n02", "n01")
    for label, name in enumerate(names):
        for i in range(3):
            file = folder / "train" / name / "images" / f"{name}_{i}.JPEG"
            image(file, (64, 64), (200 * label, 10 * i, 30))
    notes = ""
    for i, name in enumerate((*names, names[1])):
        image(folder / "val" / "images" / f"val_{i}.JPEG", (64, 64), (9, 9, 9))
        notes += f"val_{i}.JPEG\t{name}\t0\t0\t63\t63\n"
    (folder / "val" / "val_annotations.txt").write_text(notes)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    return base


def imagenet_folder(base: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("n01", "n02")):
            for i in range(count):
                file = base / part / name / f"{i}.{'png' if i else 'JPEG'}"
                image(file, (90 + 40 * i, 70), (100 * label, 50, 20 * i))
    return base


ALLX = np.array([[1, 0, 1], [0, 2, 0], [0, 0, 1], [1, 1, 0]], dtype=np.float32)
TX = np.array([[0, 3, 1], [1, 0, 0]], dtype=np.float32)


def cora_folder(base: Path) -> Path:
    """Six nodes, two to learn from; test nodes 5 and 4, in this order."""
    sparse = pytest.importorskip("scipy.sparse", reason="scipy makes the sparse matrices")
    base.mkdir(parents=True, exist_ok=True)
    hot = np.eye(2, dtype=np.int32)
    graph = defaultdict(list, {0: [1, 5], 1: [0], 2: [2, 3], 3: [], 4: [3], 5: [0]})
    contents = {
        "x": sparse.csr_matrix(ALLX[:2]),
        "allx": sparse.csr_matrix(ALLX),
        "tx": sparse.csr_matrix(TX),
        "y": hot[[0, 1]],
        "ally": hot[[0, 1, 1, 0]],
        "ty": hot[[1, 0]],
        "graph": graph,
    }
    for part, content in contents.items():
        old = pickle.dumps(content, 2).replace(b"scipy.sparse._csr\n", b"scipy.sparse.csr\n")
        (base / f"ind.cora.{part}").write_bytes(old)
    (base / "ind.cora.test.index").write_text("5\n4\n")
    return base
