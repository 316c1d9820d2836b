"""Arithmetic with one IEEE rounding for each written operation."""

import triton
import triton.language as tl


@triton.jit
def root(x):
    """Correctly rounded square root; ``tl.sqrt`` is an approximation in float32."""
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def quotient(x, y):
    """``x / y`` correctly rounded; ``/`` is an approximation in float32."""
    if x.dtype == tl.float64:
        z = x / y
    else:
        z = tl.div_rn(x, y)
    return z


@triton.jit
def larger(x, y):
    """The larger value; NaN where either is NaN, as ``torch.maximum``."""
    return tl.where((x >= y) | (x != x), x, y)


@triton.jit
def sign(x):
    """1 above 0, -1 below, a zero or NaN as it is."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def finite(x):
    """Whether neither NaN nor infinite."""
    return x - x == 0


@triton.jit
def add_step(moved, step):
    """``moved + step``; where the step is zero, moved to the bit, the sign of a zero too."""
    return tl.where(step == 0, moved, moved + step)


@triton.jit
def widen(bits):
    """float32 of the bits of a bfloat16; Triton's interpreter loses subnormals."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x):
    """Bits of the nearest bfloat16, ties to even; a NaN becomes the quiet NaN that torch stores."""
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, up).to(tl.uint16)


@triton.jit
def nearest(x, DT: tl.constexpr):
    """x rounded to DT."""
    return widen(narrow(x)) if DT == tl.bfloat16 else x.to(DT).to(x.dtype)


@triton.jit
def rounding_key(seed, t):
    """What step t mixes into the places of a tensor's elements; SplitMix64."""
    x = seed.to(tl.uint64) + t.to(tl.int64).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 32).to(tl.uint32)


@triton.jit
def at_random(x, key, place):
    """x rounded up or down to a bfloat16 by 16 bits of MurmurHash3's finaliser."""
    h = key ^ place
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    up = ((x.to(tl.uint32, bitcast=True) + (h >> 16)) >> 16) << 16
    return tl.where(x != x, x, up.to(tl.float32, bitcast=True))


@triton.jit
def _split(x):
    """Halves of a float64 whose products are exact (Dekker)."""
    wide = x * 134217729.0  # 2^27 + 1
    high = wide - (wide - x)
    return high, x - high


@triton.jit
def _product(x, x_low, y, y_low):
    """Product of two numbers of twice the precision, each given as its high and low part."""
    xh, xl = _split(x)
    yh, yl = _split(y)
    high = x * y
    error = ((xh * yh - high) + xh * yl + xl * yh) + xl * yl
    low = error + (x * y_low + x_low * y)
    total = high + low
    return total, low - (total - high)


@triton.jit
def power(x, n):
    """``x^n`` for whole n >= 0, float64: by squaring in twice the precision, then rounded."""
    square = x + tl.zeros_like(n)
    square_low = tl.zeros_like(square)
    result = square_low + 1.0
    low = square_low
    k = n.to(tl.int64)
    while tl.max(k) > 0:
        more, more_low = _product(result, low, square, square_low)
        odd = (k & 1) == 1
        result, low = tl.where(odd, more, result), tl.where(odd, more_low, low)
        square, square_low = _product(square, square_low, square, square_low)
        k = k >> 1
    return result + low
