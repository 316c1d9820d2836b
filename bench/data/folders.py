"""Folders of image files: Tiny ImageNet, and ImageNet with a folder a class. They need pillow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .base import Data, DataError, Raw, below

_SUFFIXES = (".jpeg", ".jpg", ".png")


def tiny_imagenet(folder: Path | None) -> Raw:
    """Tiny ImageNet from FOLDER/tiny-imagenet-200 or FOLDER; its validation set is the test set."""
    base = below(folder, "tiny_imagenet", "tiny-imagenet-200")
    classes = {name: i for i, name in enumerate(_lines(base / "wnids.txt"))}
    train = [
        (path, label)
        for name, label in classes.items()
        for path in _images(base / "train" / name / "images")
    ]
    notes, test = base / "val" / "val_annotations.txt", []
    for number, line in enumerate(_lines(notes), 1):
        file, _, rest = line.partition("\t")
        name = rest.split("\t")[0]
        if name not in classes:
            raise DataError(f"{notes}: line {number}: class {name!r} is not in wnids.txt")
        test.append((base / "val" / "images" / file, classes[name]))
    return Raw(*_decoded(train), *_decoded(test), len(classes), 255.0)


def _decoded(items: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    paths, labels = zip(*items, strict=True)
    images = torch.empty(len(paths), 3, 64, 64, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(read_image, paths)):
            if image.shape != (3, 64, 64):
                size = "x".join(map(str, image.shape[1:]))
                raise DataError(f"{paths[i]}: image of {size}, not 64x64")
            images[i] = image
    return images, torch.tensor(labels)


def imagenet(folder: Path | None) -> Data:
    """Images in FOLDER/{train,val}/<class>/, as Caffe feeds its AlexNet, decoded when asked for.

    Squeezed to 256x256, the middle 227x227 of it, minus the mean colour of ImageNet.
    """
    base = below(folder, "imagenet", "imagenet")
    names = _folders(base / "train")
    if (others := _folders(base / "val")) != names:
        odd = sorted(set(names) ^ set(others))[0]
        raise DataError(f"{base}: class {odd!r} is only in one of train/ and val/")
    parts: list[tuple[Files, Tensor]] = []
    for part in ("train", "val"):
        paths, labels = [], []
        for label, name in enumerate(names):
            found = _images(base / part / name)
            paths += found
            labels += [label] * len(found)
        parts.append((Files(paths, _for_alexnet, (3, 227, 227)), torch.tensor(labels)))
    (x, y), (test_x, test_y) = parts
    meta = {"scaling": "minus mean colour", "train": len(x), "test": len(test_x)}
    return Data("imagenet", x, y, test_x, test_y, len(names), meta)  # type: ignore[arg-type]


def _for_alexnet(path: Path) -> Tensor:
    pixels = read_image(path, (256, 256))[:, 14:241, 14:241].float()
    return pixels - torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1)


class Files:
    """Image files in the place of a tensor (N, C, H, W): indexed with a tensor, it decodes."""

    def __init__(
        self,
        paths: Sequence[Path],
        decode: Callable[[Path], Tensor],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
    ) -> None:
        self.paths, self.decode, self.device = paths, decode, device
        self.shape = (len(paths), *shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: Tensor | slice) -> Tensor | Files:
        if isinstance(which, slice):
            return Files(self.paths[which], self.decode, self.shape[1:], self.device)
        paths = [self.paths[i] for i in which.tolist()]
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(self.decode, paths))).to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), size):
            yield self[torch.arange(start, min(start + size, len(self)))]  # type: ignore[misc]

    def to(self, device: torch.device | str) -> Files:
        return Files(self.paths, self.decode, self.shape[1:], device)


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as RGB bytes (3, H, W), squeezed to `size` where one is given."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image files are decoded by pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # what a damaged image raises differs from format to format
        raise DataError(f"{path}: not a whole image: {error}") from error
    if size is not None:
        image = image.resize(size, Image.Resampling.BILINEAR)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not lines:
        raise DataError(f"{path}: is empty")
    return lines


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise DataError(f"{folder}: holds no folder, wanted one for each class")
    return names


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    found = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(_SUFFIXES))
    if not found:
        raise DataError(f"{folder}: holds no image ({', '.join(_SUFFIXES)})")
    return [folder / name for name in found]
