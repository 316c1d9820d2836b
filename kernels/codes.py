"""State in fewer bits: the codes of ``csrc/codes.h``, and bfloat16."""

import triton
import triton.language as tl

from .arithmetic import quotient, root

BLOCK_OF_CODES = tl.constexpr(64)
_WHOLE = tl.constexpr(12582912.0)  # 3 * 2^22: what is below 1 is rounded away
_LEAST = tl.constexpr(2.0**-94)
_LARGEST_ROOT = tl.constexpr(2.0**64 * (1 - 2.0**-22))
_SIGNED = tl.constexpr(127.0**2)
_UNSIGNED = tl.constexpr(255.0**4)
_JUST_BELOW = tl.constexpr(1 - 2.0**-18)


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
    z = _UNSIGNED if NONNEGATIVE else _SIGNED
    counts = most >= _LEAST
    finite = most - most == 0
    to_z = tl.where(
        counts & finite, quotient(tl.zeros_like(most) + z, tl.where(counts, most, 1.0)), 0.0
    )
    held = most
    one = 1.0 / _SIGNED
    if NONNEGATIVE:
        part = root(most)
        held = tl.where(finite, tl.where(part < _LARGEST_ROOT, part, _LARGEST_ROOT), most)
        one = 1.0 / 65025.0
    return to_z, tl.where(most < _LEAST, 0.0, held * one)


@triton.jit
def encode(x, to_z, NONNEGATIVE: tl.constexpr):
    """Whole numbers, the codes of x."""
    most = _UNSIGNED if NONNEGATIVE else _SIGNED
    z = _magnitude(x) * to_z
    z = tl.where(z < most, z, most)
    part = root(z)
    if NONNEGATIVE:
        part = root(part)
    c = (part * _JUST_BELOW + _WHOLE) - _WHOLE
    half = c + 0.5
    threshold = half * half
    if NONNEGATIVE:
        threshold = threshold * threshold
    c = tl.where(z >= threshold, c + 1.0, c)
    if NONNEGATIVE:
        c = tl.where((x > 0) & (c < 1.0), 1.0, c)
    else:
        c = tl.where(x < 0, -c, c)
    return c


@triton.jit
def decode(c, scale, NONNEGATIVE: tl.constexpr):
    """The numbers that codes stand for."""
    x = (c * _magnitude(c)) * scale
    if NONNEGATIVE:
        x = x * x
    return x
