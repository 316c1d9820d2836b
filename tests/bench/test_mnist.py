"""MNIST's reader, splits and batches: read right, bad files named."""

from __future__ import annotations

import gzip
from pathlib import Path

import bench_packages  # noqa: F401
import pytest
import torch
from data_folders import idx, mnist_folder

from bench.data import DataError, load, read_idx
from bench.trainer import Batches


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["MNIST/raw", "raw", "."])
def test_mnist_is_read_from_each_layout(tmp_path: Path, below: str, zipped: bool) -> None:
    mnist_folder(tmp_path / below, zipped)
    data = load("mnist", tmp_path, scaling="unit")
    assert data.shape == (1, 28, 28) and len(data.x) == 6 and len(data.test_x) == 4
    assert data.y.tolist() == [0, 1, 2, 3, 4, 5]
    # Item 1, row 0, column 2 is byte 786 of the file: row-major, images one after another.
    assert data.x[1, 0, 0, 2].item() == (786 % 251) / 256
    standard = load("mnist", tmp_path)
    assert standard.x.mean().abs() < 1e-5 and abs(standard.x.std(correction=0) - 1) < 1e-5
    # The test set is scaled by the train set's figures.
    expected = (data.test_x * 256 - standard.meta["mean"]) / standard.meta["std"]
    torch.testing.assert_close(standard.test_x, expected)


GOOD = idx((6, 28, 28), bytes(6 * 784))


BAD_FILES = {
    "magic": ("train_images", idx((6, 28, 28), bytes(6 * 784), b"\x00\x00\x0d\x03"), "begins"),
    "not idx": ("train_images", b"<html>not found</html>", "not an idx file"),
    "empty": ("train_labels", b"", "not an idx file"),
    "header": ("train_images", GOOD[:9], "truncated within the header"),
    "truncated": ("train_images", GOOD[:-1], "promises 4704 bytes, the file holds 4703"),
    "too long": ("train_images", GOOD + b"\x00", "too long"),
    "giant": ("t10k_images", idx((2**32 - 1, 2**32 - 1, 28), bytes(99)), "holds 99"),
    "no items": ("t10k_labels", idx((0,), b""), "no items"),
    "shape": ("train_images", idx((6, 14, 14), bytes(6 * 196)), r"\(14, 14\)"),
    "counts": ("train_labels", idx((5,), bytes(5)), "5 labels for 6 images"),
    "label": ("t10k_labels", idx((4,), bytes((1, 2, 10, 3))), "label 10 at item 2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bad_file_is_named(tmp_path: Path, case: str, zipped: bool) -> None:
    which, content, message = BAD_FILES[case]
    mnist_folder(tmp_path, zipped, **{which: content})
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", tmp_path)
    assert which.replace("_", "-") in str(caught.value)


def test_a_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD)
    flipped = whole[:14] + bytes((whole[14] ^ 0xFF,)) + whole[15:]
    for content in (whole[:-12], flipped, b"plain text"):
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
            read_idx(path, 3)


def test_folders_and_names_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte\[.gz\] in .*MNIST/raw"):
        load("mnist", tmp_path)
    with pytest.raises(DataError, match="needs a folder"):
        load("mnist")
    with pytest.raises(DataError, match="take no folder"):
        load("digits", tmp_path)
    with pytest.raises(DataError, match="there are: digits, mnist"):
        load("letters")


def test_digits_split_is_fixed() -> None:
    data = load("digits")
    assert data.x.shape == (1200, 1, 8, 8) and data.test_x.shape == (597, 1, 8, 8)
    assert data.x.mean().abs() < 1e-6 and abs(data.x.std(correction=0) - 1) < 1e-6
    assert data.y[:10].tolist() == list(range(10))
    assert data.test_y[-5:].tolist() == [9, 0, 8, 9, 8]
    assert data.y.bincount().tolist() == [119, 121, 117, 121, 120, 123, 120, 118, 119, 122]
    unit = load("digits", scaling="unit")
    assert unit.x.min() == 0 and unit.x.max() == 1


def test_holdout_is_taken_from_the_train_set() -> None:
    data = load("digits")
    held = data.holdout(0.25)
    assert torch.equal(torch.cat([held.x, held.test_x]), data.x)
    assert torch.equal(torch.cat([held.y, held.test_y]), data.y)
    assert len(held.test_x) == 300


def test_batches_visit_every_item_once_an_epoch() -> None:
    batches = Batches(10, 3, seed=1, device=torch.device("cpu"))
    epoch = torch.cat([batches(step) for step in range(3)])
    assert epoch.unique().numel() == 9
    assert not torch.equal(epoch, torch.cat([batches(step) for step in range(3, 6)]))
    assert torch.equal(epoch[:3], batches(0))  # back again: no hidden state
    assert not torch.equal(batches(0), Batches(10, 3, 2, torch.device("cpu"))(0))
    assert len(Batches(10, 64, 0, torch.device("cpu"))(5)) == 10  # a small set is one batch
