"""State in fewer bits: the codes of ``csrc/codes.h``, and bfloat16."""

import triton
import triton.language as tl

from .arithmetic import quotient, root

BLOCK_OF_CODES = tl.constexpr(64)
_WHOLE = tl.constexpr(12582912.0)  # 3 * 2^22: what is below 1 is rounded away
_LEAST = tl.constexpr(2.0**-94)


@triton.jit
def _magnitude(x):
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def largest(x):
    """The largest ``|x|`` of each block, or NaN: without a sign the bits are in order."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    blocks: tl.constexpr = bits.shape[1] // BLOCK_OF_CODES
    bits = tl.reshape(bits, (bits.shape[0], blocks, BLOCK_OF_CODES))
    return tl.max(bits, 2).to(tl.float32, bitcast=True)


@triton.jit
def any_of_blocks(inside):
    """Whether each block has an element."""
    blocks: tl.constexpr = inside.shape[1] // BLOCK_OF_CODES
    parts = tl.reshape(inside.to(tl.int32), (inside.shape[0], blocks, BLOCK_OF_CODES))
    return tl.max(parts, 2) > 0


@triton.jit
def spread(of_blocks):
    """A number of each block, for each of its elements."""
    n: tl.constexpr = of_blocks.shape[0]
    blocks: tl.constexpr = of_blocks.shape[1]
    wide = tl.broadcast_to(of_blocks[:, :, None], (n, blocks, BLOCK_OF_CODES))
    return tl.reshape(wide, (n, blocks * BLOCK_OF_CODES))


@triton.jit
def scales(most, NONNEGATIVE: tl.constexpr):
    """What a block is encoded with, and the scale that is stored."""
    m = tl.where(most > _LEAST, most, _LEAST)
    to_z = quotient(tl.zeros_like(m) + (4228250625.0 if NONNEGATIVE else 16129.0), m)
    held = root(m) if NONNEGATIVE else m
    one = 1.0 / 65025.0 if NONNEGATIVE else 1.0 / 16129.0
    return to_z, held * one + (most * 4 - most * 4)  # NaN from 2^126 on


@triton.jit
def _middle(z, UNIT: tl.constexpr):
    """The middle of the numbers that differ from z in bits below UNIT only."""
    return (z.to(tl.int32, bitcast=True) & -UNIT | UNIT // 2).to(tl.float32, bitcast=True)


@triton.jit
def encode(x, to_z, NONNEGATIVE: tl.constexpr):
    """Whole numbers, the codes of x."""
    z = _magnitude(x) * to_z
    if NONNEGATIVE:
        c = tl.sqrt(tl.sqrt(_middle(z, 0x10000)))
        least = (x > 0).to(tl.float32)
        c = tl.where(c > least, c, least)
    else:
        c = tl.sqrt(_middle(z, 0x100))
        c = tl.where(x < 0, -c, c)
    return (c + _WHOLE) - _WHOLE


@triton.jit
def decode(c, scale, NONNEGATIVE: tl.constexpr):
    """The numbers that codes stand for."""
    x = (c * _magnitude(c)) * scale
    if NONNEGATIVE:
        x = x * x
    return x
