"""State in fewer bits than 32: the group key ``state_dtype``.

===============  ====================================  =====================  =====================
``state_dtype``  the arithmetic state x                stored after a step    bytes a number
===============  ====================================  =====================  =====================
``"float32"``    ``s``                                 ``s = x``              4
``"bfloat16"``   ``s``                                 ``s = round(x)``       2
``"8bit"``       ``c*|c|*k``, momenta                  ``c, k = encode(x)``   1 + 1/16
                 ``(c*c*k)^2``, what is never below 0
===============  ====================================  =====================  =====================

A row is all that one index of dimension 0 selects, in order; a block is up to 64 numbers side by
side in it, as many as divide the row evenly. With M the largest magnitude in a block,

    signed    c = round(127 * |x/M|^(1/2)) with the sign of x          k = M/127^2
    unsigned  c = round(255 *  (x/M)^(1/4)), at least 1 where x > 0    k = M^(1/2)/255^2

so that codes lie closer near zero; M counts as 2^-94 where it is less. To the bit: ``z = |x| *
(127^2/M)`` or ``x * (255^4/M)`` is put in the middle of the floats that begin with the same 16 bits
(unsigned: 8), where no z is near a number at which codes change, so that a root need not be exact
for all engines to store the same codes. Every operation is one of float32, rounded once, in the
order of `encode` and `decode`. The step u is formed from what is stored: where it has the root of
an unsigned x, that is ``c*c*k`` to the bit (the rounded square of a float has that float as its
root), which native engines take. Where a block has a number of 2^126 or more, or NaN, k is NaN, and
so is all of the block.

Codes are ``int8`` or ``uint8`` under torch's own key, of the parameter's shape; the ``k`` of each
block lie beside them under that key with ``_scale``, float32 ``(rows, blocks of a row)``.

8 bits are for the parameters that the rule governs (without a rule: of two or more dimensions
larger than 1) with at least 4,096 weights in blocks of 16 or more; the others store float32. Only
the shape of the whole parameter counts, not that of a shard, and a shard along dimension 0 holds
whole rows: codes stay what they are, whatever the number of processes. Shards that cut a block are
refused. Parameters of float64 and complex ones have state of their own dtype, whatever
``state_dtype`` says.

Source: blocks and 8-bit codes with a scale each, Dettmers et al. 2022 (arXiv:2110.02861); these
codes are ours; ``bench.papers.state_codes`` compares them with that paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from . import _C, dtensor, memory
from .directions.base import root

StateDtype = Literal["float32", "bfloat16", "8bit"]
#: one tensor of the state as it is stored: its numbers, or their codes and scales
Packed = tuple[Tensor] | tuple[Tensor, Tensor]

#: parameters with fewer weights store float32, and those with fewer numbers in a block
SMALL, SMALL_BLOCK = 4096, 16

#: dtypes of codes of 8 bits
CODES = (torch.int8, torch.uint8)
#: dtypes of parameters with arithmetic in float32, whose state can have fewer bits
_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_LEAST = 2.0**-94


def scale_key(key: str) -> str:
    """Where the scales of the codes under a key lie."""
    return f"{key}_scale"


def is_codes(x: Tensor) -> bool:
    """Whether a state tensor holds codes of 8 bits."""
    return x.dtype in CODES


def is_coded(x: Tensor) -> bool:
    """Whether a state tensor, of a parameter with arithmetic in float32, has fewer bits."""
    return x.dtype in (*CODES, torch.bfloat16)


def is_coded_of(p: Tensor, x: Tensor) -> bool:
    """Whether a state tensor has fewer bits, as that of such a parameter may."""
    return p.dtype in _SINGLE and is_coded(x)


def dtype_of(p: Tensor, state_dtype: str, governed: bool, nonnegative: bool) -> torch.dtype | None:
    """Dtype of a state tensor in fewer bits; None: that of the arithmetic."""
    if p.dtype not in _SINGLE or state_dtype == "float32":
        return None
    if state_dtype == "bfloat16":
        return torch.bfloat16
    if not governed or p.ndim < 2 or p.numel() < SMALL or block_size(p.shape) < SMALL_BLOCK:
        return None
    return torch.uint8 if nonnegative else torch.int8


@functools.cache
def _largest_divisor(n: int, most: int) -> int:
    return next(d for d in range(most, 0, -1) if n % d == 0)


def block_size(shape: torch.Size) -> int:
    """Numbers that share a scale, in a tensor of a shape."""
    return _largest_divisor(shape[1:].numel(), _C.CODE_BLOCK)


def blocks_of(shape: torch.Size) -> int:
    """Blocks of a row."""
    return shape[1:].numel() // block_size(shape)


def scale_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the scales of codes of a shape."""
    return shape[0], blocks_of(shape)


def _blocks(x: Tensor, blocks: int | None = None) -> Tensor:
    """Rows, blocks, numbers; ``blocks``: those of a row, where x is a piece of rows."""
    blocks = blocks or blocks_of(x.shape)
    return x.reshape(len(x), blocks, x.shape[1:].numel() // blocks)


def encode(x: Tensor, dtype: torch.dtype, of_row: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 numbers; ``of_row``: blocks of a row, where x is a shard."""
    blocks = _blocks(x.contiguous(), of_row)
    largest = blocks.abs().amax(2, keepdim=True)
    m = torch.where(largest > _LEAST, largest, _LEAST)
    signed = dtype == torch.int8
    held, last, top = (m, 127, 127.0**2) if signed else (root(m), 255, 255.0**4)
    scale = held * (1.0 / last**2) + (largest * 4 - largest * 4)  # NaN from 2^126 on
    z = blocks.abs() * (torch.full_like(m, top) / m)  # top / m would take the inverse first
    if signed:
        c = torch.sqrt(_middle(z, 0x100))
        c = torch.where(blocks < 0, -c, c)
    else:
        c = torch.sqrt(torch.sqrt(_middle(z, 0x10000)))
        least = (blocks > 0).to(c)
        c = torch.where(c > least, c, least)
    return c.round().to(dtype).reshape(x.shape), scale[..., 0].contiguous()


def _middle(z: Tensor, unit: int) -> Tensor:
    """The middle of the numbers that differ from z in bits below ``unit`` only."""
    return (z.view(torch.int32) & -unit | unit // 2).view(torch.float32)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers that are stored, in float32."""
    c = _blocks(codes, scale.shape[1]).float()
    held = (c * c.abs()) * scale[..., None]
    x = held if codes.dtype == torch.int8 else held * held
    return x.reshape(codes.shape)


# -- one tensor of a state -------------------------------------------------------------------------


def load(state: Mapping[str, Any], key: str) -> Tensor:
    """The numbers that are stored, in the dtype that they have if they are no codes."""
    value: Tensor = state[key]
    return decode(value, state[scale_key(key)]) if is_codes(value) else value


def pack(state: Mapping[str, Any], key: str, x: Tensor) -> Packed:
    """What a store of x writes."""
    target: Tensor = state[key]
    if is_codes(target):
        return encode(x, target.dtype, state[scale_key(key)].shape[1])
    return (x.to(target.dtype) if is_coded(target) else x,)


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """What a load finds once it is stored, in the dtype of the arithmetic."""
    return decode(*packed) if len(packed) == 2 else packed[0].to(dtype)


def store(state: Mapping[str, Any], key: str, new: Packed, skip: Tensor | None = None) -> None:
    """Store what `pack` made; ``skip``: leave rows with such an element alone."""
    target: Tensor = state[key]
    if len(new) == 1:
        (x,) = new
        target = torch.view_as_real(target) if target.is_complex() else target
        target.copy_(x if skip is None else torch.where(skip, target.to(x.dtype), x))
        return
    for old, value in zip((target, state[scale_key(key)]), new, strict=True):
        if skip is not None:
            of_rows = skip.expand(target.shape).reshape(len(target), -1)[:, 0]
            value = torch.where(of_rows.view(-1, *[1] * (value.ndim - 1)), old, value)
        old.copy_(value)


def convert(
    state: dict[str, Any], key: str, p: Tensor, wanted: torch.dtype | None, name: str
) -> None:
    """Bring one tensor of the state of p into the wanted bits, where it is not.

    None: those of the arithmetic.

    Raises
    ------
    RuntimeError
        Where scales are missing, or a shard of p cuts blocks.
    """
    value: Tensor = state[key]
    if is_codes(value):
        scale = state.get(scale_key(key))
        if not isinstance(scale, Tensor) or tuple(scale.shape) != scale_shape(p.shape):
            raise RuntimeError(
                f"state {key!r} of parameter {name!r} holds codes without their scales, which "
                f"belong into {scale_key(key)!r}: load both, or delete optimizer.state[param] to "
                "start afresh"
            )
        state[key] = value.contiguous()
        scale = memory.writable(scale.to(p.device, torch.float32).contiguous())
        state[scale_key(key)] = _placed_scale(p, scale, name)
    narrow = is_codes(value) or value.dtype in (torch.bfloat16, torch.float16)
    if value.dtype == wanted or (wanted is None and not narrow):
        return
    local = {k: dtensor.local_part(state[k]) for k in (key, scale_key(key)) if k in state}
    x = load(local, key).float()
    state.pop(scale_key(key), None)
    if wanted not in CODES:
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        state[key] = dtensor.like(p, x.to(wanted or wide))
        return
    codes, scale = encode(x, wanted, _blocks_here(p, name))
    state[key] = dtensor.like(p, codes)
    state[scale_key(key)] = dtensor.like(p, scale, scale_shape(p.shape))


def _placed_scale(p: Any, scale: Tensor, name: str) -> Tensor:
    _blocks_here(p, name)
    return dtensor.placed_as(p, scale, f"scales of parameter {name!r}")


def _blocks_here(p: Any, name: str) -> int:
    """Blocks of the part of a row that this process holds.

    Raises
    ------
    RuntimeError
        For shards that cut blocks: pieces of rows that are no whole blocks.
    """
    if not dtensor.is_sharded(p):
        return blocks_of(p.shape)
    block = block_size(p.shape)
    rows_whole = {q.dim for q in p.placements if not q.is_replicate()} <= {0}
    length = p._local_tensor.shape[1:].numel()
    if length % block or not (rows_whole or p.ndim == 2):
        raise RuntimeError(
            f"state_dtype='8bit' works with blocks of {block} numbers side by side; parameter "
            f"{name!r} of shape {tuple(p.shape)} is placed {p.placements}, which cuts them: give "
            "it a group with state_dtype='float32' or 'bfloat16'"
        )
    return length // block
