"""Readers of data sets: standard layouts read right, bad ones named, hostile ones not executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("numpy", reason="data sets are read with NumPy")

import numpy as np
from data_folders import (
    ALLX,
    cifar10_folder,
    cifar100_folder,
    cora_folder,
    image,
    imagenet_folder,
    tiny_imagenet_folder,
)

from bench.data import DataError, load
from bench.data.pickles import load_pickle


def test_cifar10(tmp_path: Path) -> None:
    data = load("cifar10", cifar10_folder(tmp_path), scaling="unit")
    assert data.shape == (3, 32, 32) and len(data.x) == 20 and len(data.test_x) == 4
    assert data.y.tolist() == [(b + i) % 10 for b in range(5) for i in range(4)]
    assert data.test_y.tolist() == [5, 6, 7, 8]
    folder = tmp_path / "cifar-10-batches-py"
    stored = pickle.loads((folder / "data_batch_2").read_bytes())["data"].reshape(4, 3, 32, 32)
    assert data.x[5, 2, 7, 31].item() == pytest.approx(stored[1, 2, 7, 31] / 255)
    assert torch.equal(load("cifar10", folder, scaling="unit").x, data.x)  # the folder itself


def test_scalings(tmp_path: Path) -> None:
    cifar10_folder(tmp_path)
    raw = load("cifar10", tmp_path, scaling="unit")
    centred = load("cifar10", tmp_path, scaling="centred")
    mean = 255 * raw.x.mean(0)
    torch.testing.assert_close(centred.test_x, 255 * raw.test_x - mean, atol=1e-3, rtol=0)
    standard = load("cifar10", tmp_path)
    assert standard.x.mean().abs() < 1e-5 and abs(standard.x.std(correction=0) - 1) < 1e-5


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    data = load("cifar100", cifar100_folder(tmp_path))
    assert data.classes == 100 and data.y.tolist() == [0, 17, 34, 51, 68, 85]


def test_tiny_imagenet(tmp_path: Path) -> None:
    data = load("tiny_imagenet", tiny_imagenet_folder(tmp_path), scaling="unit")
    assert data.shape == (3, 64, 64) and data.classes == 2
    # In the order of wnids.txt, not of the alphabet.
    assert data.y.tolist() == [0, 0, 0, 1, 1, 1] and data.test_y.tolist() == [0, 1, 1]
    red, green, _ = (255 * data.x[5]).mean((1, 2)).tolist()
    assert red == pytest.approx(200, abs=4) and green == pytest.approx(20, abs=4)


def test_imagenet_is_decoded_when_indexed(tmp_path: Path) -> None:
    data = load("imagenet", imagenet_folder(tmp_path))
    assert data.shape == (3, 227, 227) and data.y.tolist() == [0, 0, 0, 1, 1, 1]
    batch = data.x[torch.tensor([5, 0])]
    assert batch.shape == (2, 3, 227, 227)
    expected = torch.tensor([100 - 123.0, 50 - 117.0, 40 - 104.0])
    torch.testing.assert_close(batch[0].mean((1, 2)), expected, atol=3, rtol=0)
    assert [len(part) for part in data.test_x.split(3)] == [3, 1]
    assert data.some(2).y.tolist() == [0, 1] and len(data.some(2).x) == 2
    assert data.to("cpu").x[torch.tensor([5])].equal(batch[:1])


def test_cora(tmp_path: Path) -> None:
    data = load("cora", cora_folder(tmp_path))
    assert data.x.tolist() == [0, 1] and data.y.tolist() == [0, 1]
    assert data.test_x.tolist() == [4, 5] and data.test_y.tolist() == [0, 1]
    # Row 0 of tx belongs to node 5, the first of the index; rows sum to 1.
    assert data.features[5].tolist() == [0, 0.75, 0.25] and data.features[4].tolist() == [1, 0, 0]
    assert data.features[0].tolist() == [0.5, 0, 0.5]
    edges = {tuple(edge) for edge in data.edges.T.tolist()}
    assert edges == {(0, 1), (1, 0), (0, 5), (5, 0), (2, 3), (3, 2), (3, 4), (4, 3)}
    assert load("cora", tmp_path).to("cpu").edges.equal(data.edges)


def test_some_is_spread_over_the_set(tmp_path: Path) -> None:
    data = load("cifar10", cifar10_folder(tmp_path))
    few = data.some(5)
    assert few.y.tolist() == data.y[::4].tolist() and few.meta["train"] == 5
    assert len(data.some(1000).x) == 20 and data.some(1000).meta["test"] == 4


# --- bad files ---

READERS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "cifar10": (
        cifar10_folder,
        ("cifar-10-batches-py/data_batch_3", "cifar-10-batches-py/test_batch"),
    ),
    "cifar100": (cifar100_folder, ("cifar-100-python/train", "cifar-100-python/test")),
    "cora": (
        cora_folder,
        tuple(f"ind.cora.{p}" for p in ("allx", "tx", "y", "ally", "ty", "graph")),
    ),
}
PICKLES = [(name, file) for name, (_, files) in READERS.items() for file in files]


class Command:
    """Runs a command when unpickled, as pickles can."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def hostile() -> dict[str, bytes]:
    call = b"(S'touch executed'\ntR."
    return {
        "at the top": pickle.dumps(Command()),
        "in a dict": pickle.dumps({"data": Command(), "labels": [1], "fine_labels": [1]}, 2),
        "in a list": pickle.dumps(
            {"data": np.zeros((1, 3072), np.uint8), "labels": [Command()]}, 2
        ),
        "in an object array": pickle.dumps(np.array([Command()], dtype=object), 2),
        "in a numpy scalar": pickle.dumps(np.float64(1), 2),
        "protocol 0": b"cos\nsystem\n" + call,
        "posix": b"cposix\nsystem\n" + call,
        "eval": b'cbuiltins\neval\n(S\'__import__("os").system("touch executed")\'\ntR.',
        "getattr": b"c__builtin__\ngetattr\n(c__builtin__\nlist\nS'append'\ntR.",
        "dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0blist.append\x93.",
        "numpy's own": b"cnumpy.testing._private.utils\nrunstring\n" + call,
        "instance": b"(S'touch executed'\nios\nsystem\n.",
        "persistent": b"P1\n.",
        "extension": b"\x82\x01.",
    }


@pytest.mark.parametrize("case", hostile())
@pytest.mark.parametrize(("name", "file"), PICKLES)
def test_a_hostile_pickle_is_named_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    READERS[name][0](tmp_path)
    (tmp_path / file).write_bytes(hostile()[case])
    with pytest.raises(DataError, match=f"{Path(file).name}: not a whole pickle of arrays"):
        load(name, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_hostile_pickle_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(hostile()["at the top"])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "file"), PICKLES)
def test_a_truncated_pickle_is_named(tmp_path: Path, name: str, file: str) -> None:
    READERS[name][0](tmp_path)
    whole = (tmp_path / file).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"<html>", b"\x80\x05\x95"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(DataError, match=f"{Path(file).name}: not a whole pickle"):
            load(name, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=Path(file).name):
        load(name, tmp_path)


def array_pickle(code: bytes, order: bytes, shape: bytes, content: bytes) -> bytes:
    """What numpy writes, with any field forged."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
        + shape
        + b"tcnumpy\ndtype\n(S'"
        + code
        + b"'\nI0\nI1\ntR(I3\nS'"
        + order
        + b"'\nNNNI-1\nI-1\nI0\ntbI00\nS'"
        + content
        + b"'\ntb."
    )


def test_arrays_are_those_of_numpy(tmp_path: Path) -> None:
    path = tmp_path / "array"
    path.write_bytes(array_pickle(b"i2", b"<", b"I2\n", b"\\x01\\x00\\xff\\xff"))
    assert load_pickle(path).tolist() == [1, -1]
    random = np.random.default_rng(0)
    arrays = [
        random.normal(size=(3, 4)),
        np.asfortranarray(random.normal(size=(3, 4)).astype(np.float32)),
        random.integers(-9, 9, (2, 3, 4)).astype(np.int64),
        random.integers(0, 2, 5).astype(bool),
        np.zeros((0, 4), np.int8),
    ]
    for array in arrays:
        for protocol in (0, 2, 4):
            path.write_bytes(pickle.dumps(array, protocol))
            tensor = load_pickle(path)
            assert np.array_equal(tensor.numpy(), array) and tensor.numpy().dtype == array.dtype


FORGED = {
    "bytes too few": array_pickle(b"i4", b"<", b"I2\n", b"abcd"),
    "shape of exabytes": array_pickle(b"i8", b"<", b"I999999999\nI999999999\n", b"abcdefgh"),
    "negative shape": array_pickle(b"u1", b"|", b"I-4\n", b"abcd"),
    "objects": array_pickle(b"O8", b"|", b"I1\n", b"abcdefgh"),
    "foreign order": array_pickle(b"i4", b">", b"I1\n", b"abcd"),
    "no dtype": array_pickle(b"x9", b"<", b"I1\n", b"abcd"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_array_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "array").write_bytes(FORGED[case])
    with pytest.raises(DataError, match="array: not a whole pickle"):
        load_pickle(tmp_path / "array")


@pytest.mark.parametrize("wrong", ["column", "rows", "backwards", "huge"])
def test_a_forged_sparse_matrix_is_refused(tmp_path: Path, wrong: str) -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="scipy makes the sparse matrices")
    matrix = sparse.csr_matrix(ALLX)
    if wrong == "column":
        matrix.indices[0] = 3
    elif wrong == "rows":
        matrix.indptr = matrix.indptr[:-1]
    elif wrong == "backwards":
        matrix.indptr[1:3] = matrix.indptr[2], matrix.indptr[1]
    else:
        matrix._shape = (4, 1 << 40)
    (tmp_path / "matrix").write_bytes(pickle.dumps(matrix, 2))
    with pytest.raises(DataError, match="matrix: not a whole pickle"):
        load_pickle(tmp_path / "matrix")


def batch(**changed: object) -> bytes:
    content = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]} | changed
    return pickle.dumps({key: value for key, value in content.items() if value is not None}, 2)


BAD_BATCHES = {
    "no labels": (batch(labels=None), "not a dict with 'data' and 'labels'"),
    "a list": (pickle.dumps([1, 2], 2), "not a dict"),
    "shape": (batch(data=np.zeros((4, 784), np.uint8)), r"\(4, 784\), not \(items, 3072\)"),
    "empty": (batch(data=np.zeros((0, 3072), np.uint8)), "not .items, 3072."),
    "floats": (batch(data=np.zeros((4, 3072))), "no array of bytes"),
    "counts": (batch(labels=[1]), "1 labels for 4 images"),
    "label": (batch(labels=[0, 1, 10, 3]), "label 10 at item 2, not in 0..9"),
    "negative": (batch(labels=[0, -1, 1, 3]), "label -1 at item 1"),
    "words": (batch(labels=["cat"] * 4), "label 'cat' at item 0"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD_BATCHES[case]
    (cifar10_folder(tmp_path) / "cifar-10-batches-py" / "data_batch_4").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_4: .*{message}"):
        load("cifar10", tmp_path)


def test_bad_graphs_are_named(tmp_path: Path) -> None:
    cora_folder(tmp_path)
    graph, index = tmp_path / "ind.cora.graph", tmp_path / "ind.cora.test.index"
    whole = graph.read_bytes()
    for content, message in (
        ({0: [6]}, "an edge to node 6 of 6"),
        ({0: ["a"]}, "not a dict of lists"),
        ([1], "not a dict of lists"),
        ({}, "not a dict of lists"),
        ({0: [0.5]}, "not a dict of lists"),
    ):
        graph.write_bytes(pickle.dumps(content, 2))
        with pytest.raises(DataError, match=f"ind.cora.graph: {message}"):
            load("cora", tmp_path)
    graph.write_bytes(whole)
    for text, message in (("5\n5\n", "not the numbers 4 to 5"), ("5\nx\n", "cannot be read")):
        index.write_text(text)
        with pytest.raises(DataError, match=f"ind.cora.test.index: {message}"):
            load("cora", tmp_path)


def test_bad_image_folders_are_named(tmp_path: Path) -> None:
    tiny = tiny_imagenet_folder(tmp_path / "a") / "tiny-imagenet-200"
    photo = tiny / "train" / "n01" / "images" / "n01_1.JPEG"
    whole = photo.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        photo.write_bytes(content)
        with pytest.raises(DataError, match=r"n01_1\.JPEG: not a whole image"):
            load("tiny_imagenet", tmp_path / "a")
    image(photo, (32, 64), (0, 0, 0))
    with pytest.raises(DataError, match=r"n01_1\.JPEG: image of 64x32, not 64x64"):
        load("tiny_imagenet", tmp_path / "a")
    photo.write_bytes(whole)
    notes = tiny / "val" / "val_annotations.txt"
    notes.write_text("val_0.JPEG\tn03\t0\t0\t63\t63\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt: line 1: class 'n03'"):
        load("tiny_imagenet", tmp_path / "a")
    notes.write_text("missing.JPEG\tn01\n")
    with pytest.raises(DataError, match=r"missing\.JPEG"):
        load("tiny_imagenet", tmp_path / "a")

    imagenet_folder(tmp_path / "b")
    (tmp_path / "b" / "val" / "n03").mkdir()
    with pytest.raises(DataError, match="class 'n03' is only in one"):
        load("imagenet", tmp_path / "b")
    (tmp_path / "b" / "train" / "n03").mkdir()
    with pytest.raises(DataError, match="n03: holds no image"):
        load("imagenet", tmp_path / "b")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet", "imagenet", "cora"])
def test_folders_that_are_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} needs a folder"):
        load(name)
    with pytest.raises(DataError, match="nowhere"):
        load(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=str(tmp_path)):
        load(name, tmp_path)
