"""State in fewer bits: the codes of ``csrc/codes.h``, and bfloat16."""

import triton
import triton.language as tl

from .arithmetic import root

BLOCK_OF_CODES = tl.constexpr(64)
_WHOLE = tl.constexpr(12582912.0)  # 3 * 2^22: what is below 1 is rounded away


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
def spread(of_blocks):
    """A number of each block, for each of its elements."""
    n: tl.constexpr = of_blocks.shape[0]
    blocks: tl.constexpr = of_blocks.shape[1]
    wide = tl.broadcast_to(of_blocks[:, :, None], (n, blocks, BLOCK_OF_CODES))
    return tl.reshape(wide, (n, blocks * BLOCK_OF_CODES))


@triton.jit
def scales(most, NONNEGATIVE: tl.constexpr):
    """``1/M`` and the scale that is stored."""
    counts = most >= 5.048709793414476e-29  # 2^-94
    finite = most - most == 0
    inverse = tl.where(counts & finite, tl.div_rn(1.0, tl.where(counts, most, 1.0)), 0.0)
    if NONNEGATIVE:
        scale = most * 2.3650176539093535e-10  # 1/255^4
    else:
        scale = most * 6.200012400024801e-05  # 1/127^2
    return inverse, tl.where(most < 5.048709793414476e-29, 0.0, scale)


@triton.jit
def encode(x, inverse, NONNEGATIVE: tl.constexpr):
    """Whole numbers, the codes of x."""
    part = _magnitude(x) * inverse
    part = root(tl.where(part < 1.0, part, 1.0))
    if NONNEGATIVE:
        c = (root(part) * 255.0 + _WHOLE) - _WHOLE
        c = tl.where((x > 0) & (c < 1.0), 1.0, c)
    else:
        part = part * 127.0
        c = (tl.where(x < 0, -part, part) + _WHOLE) - _WHOLE
    return c


@triton.jit
def decode(c, scale, NONNEGATIVE: tl.constexpr):
    """The numbers that codes stand for."""
    if NONNEGATIVE:
        square = c * c
        x = (square * square) * scale
    else:
        x = (c * _magnitude(c)) * scale
    return x
