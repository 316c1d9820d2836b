"""Pickled arrays, read without executing anything.

CIFAR and Planetoid come as pickles, and a pickle may call whatever it names. `load_pickle` knows
the few names that arrays need and refuses all others. Not even those reach numpy or scipy, whose
own unpickling trusts the file (a forged dtype makes pointers of its bytes): what looks like an
array builds stand-ins of this module, which check every field and become tensors.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import DataError

_DTYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "u1": torch.uint8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f4": torch.float32,
    "f8": torch.float64,
}


_MOST = 1 << 30  # numbers of a sparse matrix, which comes as a dense one


class _Dtype:
    """`numpy.dtype`: its code alone."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code.lstrip("<=|")
        if self.code not in _DTYPES:
            raise pickle.UnpicklingError(f"array of dtype {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = {"<": "little", "=": sys.byteorder, "|": sys.byteorder}.get(state[1])
        if order != sys.byteorder or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("array of foreign byte order or with fields")


class _Array:
    """`numpy.ndarray`: shape and bytes, checked to fit; in Fortran's order, a matrix at most."""

    tensor: Tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):  # bytes of Python 2
            content = content.encode("latin1")
        kind = _DTYPES[dtype.code]
        if not isinstance(content, bytes) or any(type(n) is not int or n < 0 for n in shape):
            raise pickle.UnpicklingError(f"array of shape {shape}")
        if len(content) != math.prod(shape) * kind.itemsize:
            raise pickle.UnpicklingError(f"{len(content)} bytes for an array of shape {shape}")
        if not content:  # which frombuffer refuses
            self.tensor = torch.empty(shape, dtype=kind)
            return
        flat = torch.frombuffer(bytearray(content), dtype=kind)
        self.tensor = flat.view(shape[::-1]).mT if fortran else flat.view(shape)


class _Csr:
    """`scipy.sparse.csr_matrix`: three arrays and a shape, checked to fit."""

    tensor: Tensor  # dense

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows, columns = state.get("_shape") or state["shape"]
        data, indices, start = (state[key].tensor for key in ("data", "indices", "indptr"))
        counts = start.long().diff()
        fits = (
            len(start) == rows + 1
            and start[0] == 0
            and start[-1] == len(data) == len(indices)
            and bool((counts >= 0).all())
            and bool(((indices >= 0) & (indices < columns)).all())
        )
        if not fits or rows * columns > _MOST:
            raise pickle.UnpicklingError("sparse matrix too large, or with indices outside of it")
        self.tensor = torch.zeros(rows, columns, dtype=data.dtype)
        row = torch.arange(rows).repeat_interleave(counts)
        self.tensor.index_put_((row, indices.long()), data, accumulate=True)


def _reconstruct(kind: type, *_: object) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("an array of no known type")
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding!r}")
    return text.encode("latin1")


def _empty() -> bytes:
    return b""


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("scipy.sparse._csr", "csr_matrix"): _Csr,
    ("collections", "defaultdict"): defaultdict,
    ("_codecs", "encode"): _encode,
    **{
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in (("list", list), ("dict", dict), ("str", str), ("bytes", _empty))
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused: it asks for {module}.{name}, which no array needs"
            ) from None


def load_pickle(path: Path) -> Any:
    """Content of a file of pickled arrays; arrays and sparse matrices come as tensors.

    Raises
    ------
    DataError
        Naming the file, for whatever is no whole pickle of arrays, lists, dicts and strings.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        return _plain(content)
    except Exception as error:  # bytes that are no pickle raise whatever they lead to
        raise DataError(f"{path}: not a whole pickle of arrays: {error}") from error


def _plain(value: Any) -> Any:
    """Tensors for the stand-ins, at the top and one level down, where data files have them."""
    if isinstance(value, dict):
        return {key: _tensor(item) for key, item in value.items()}
    return _tensor(value)


def _tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, _Array | _Csr) else value
