"""Codes of 8 bits: which numbers they stand for, beside the formula."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerlr import codes
from layerlr.directions.base import root

BLOCK = 64
each_signedness = pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=["int8", "uint8"])


# -- the codes -------------------------------------------------------------------------------------


def block(*values, size=BLOCK):
    return torch.tensor([*values] + [0.0] * (size - len(values)))[None, :]


def test_signed_vectors():
    """``127*sqrt(x)``: of 1/4 it is 63.5, which ties to 64."""
    c, k = codes.encode(block(1.0, -1.0, 0.25, -0.25, 1e-4, 1e-5, -0.0), torch.int8)
    assert c[0, :7].tolist() == [127, -127, 64, -64, 1, 0, 0]
    assert k.item() == np.float32(1 / 16129)
    assert codes.decode(c, k)[0, 2].item() == np.float32(4096 * k.item())


def test_unsigned_vectors():
    """``255*x^(1/4)``: of 1/16 it is 127.5; what is there at all has a code."""
    c, k = codes.encode(block(2.0, 0.125, 2e-8, 1e-30, 0.0), torch.uint8)
    assert c[0, :5].tolist() == [255, 128, 3, 1, 0]
    assert k.item() == np.sqrt(np.float32(2.0)) * np.float32(1 / 255**2)
    assert codes.decode(c, k)[0, 1].item() == (np.float32(128**2) * np.float32(k.item())) ** 2
    assert codes.decode(c, k)[0, 1].item() == pytest.approx(2 * (128 / 255) ** 4, rel=1e-6)


#: bits of z that are kept, the power that it is of a code, the largest code, z of the largest x
FORMULAS = {torch.int8: (16, 2, 127, 127**2), torch.uint8: (8, 4, 255, 255**4)}


def z_where_codes_change(k, dtype):
    """Between codes k - 1 and k."""
    _, power, last, most = FORMULAS[dtype]
    return Fraction(2 * k - 1, 2 * last) ** power * most


def middle(z: Fraction, bits: int) -> Fraction:
    unit = Fraction(2) ** (math.frexp(float(z))[1] - bits)
    return (z // unit + Fraction(1, 2)) * unit


@each_signedness
def test_no_number_is_near_one_at_which_codes_change(dtype):
    """So a root that is right to 19 bits ends at the same code as an exact one."""
    bits, power, last, _ = FORMULAS[dtype]
    for k in range(1, last + 1):
        change = z_where_codes_change(k, dtype)
        here = middle(change, bits)
        unit = Fraction(2) ** (math.frexp(float(change))[1] - bits)
        assert min(abs(z - change) for z in (here - unit, here, here + unit)) / change > (
            power * Fraction(2) ** -19
        )


@each_signedness
def test_blocks_of_next_to_nothing_have_the_scale_of_the_least(dtype):
    least = codes.encode(block(2.0**-94), dtype)[1]
    for most in (0.0, 2.0**-95, 1e-40):
        c, k = codes.encode(block(most), dtype)
        assert k == least and codes.decode(c, k)[0, 0].item() == pytest.approx(most, abs=2e-30)
    assert not codes.encode(block(), dtype)[0].any()


@each_signedness
def test_what_is_not_finite_stays_in_its_block(dtype):
    bad = [block(1.0, math.inf), block(math.nan, 1.0), block(2.0**126), block(1.0)]
    x = codes.decode(*codes.encode(torch.cat(bad, 1), dtype))[0].reshape(4, BLOCK)
    assert x[:3].isnan().all()
    assert x[3, 0].item() == pytest.approx(1.0)


def by_hand(x: np.ndarray, dtype):
    """One number at a time, without a root, written apart from the reference."""
    f, signed = np.float32, dtype is torch.int8
    bits, _, last, most = FORMULAS[dtype]
    m = max(*(abs(v) for v in x), f(2.0**-94))
    to_z, found = f(most) / m, []
    for v in x:
        z = Fraction(float(f(abs(v)) * to_z))
        z = middle(z, bits) if z else z
        c = sum(z >= z_where_codes_change(k, dtype) for k in range(1, last + 1))
        found.append(-c if signed and v < 0 else max(c, int(v > 0) * (not signed)))
    return found, (m if signed else np.sqrt(m)) * (f(1) / f(last**2))


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-94, 2.0**126, width=32, exclude_max=True))
@example(2.0**-94)
@example(2.0**126 * (1 - 2.0**-24))
def test_the_root_of_what_is_never_below_zero_is_at_hand(most):
    """What native engines take in place of a root: ``c*c*k``, for every code."""
    every = torch.arange(256).to(torch.uint8).view(4, BLOCK)
    k = codes.encode(block(most), torch.uint8)[1].expand(4, 1)
    held = (every.float() * every.float()) * k
    x = codes.decode(every, k)
    assert torch.equal(root(x), held) and x.isfinite().all()
    assert x.max().item() == pytest.approx(most, rel=1e-6)


finite = st.floats(-(2.0**100), 2.0**100, width=32)
numbers = st.lists(st.one_of(finite, st.floats(-1, 1, width=32)), min_size=BLOCK, max_size=BLOCK)


@each_signedness
@settings(max_examples=60, deadline=None)
@given(numbers)
@example([2.0**-126, *[0.0] * (BLOCK - 1)])  # too small for a scale
def test_codes_are_those_of_the_formula(dtype, values):
    signed = dtype == torch.int8
    x = torch.tensor(values) if signed else torch.tensor(values).abs()
    c, k = codes.encode(x[None], dtype)
    expected, scale = by_hand(x.numpy(), dtype)
    assert c[0].tolist() == expected and k.item() == scale


@each_signedness
@settings(max_examples=60, deadline=None)
@given(numbers)
def test_the_error_is_half_a_step(dtype, values):
    """In the scale of the codes, the root or fourth root of x/M; 8 bits of what is never below 0
    move the ends of a step by a quarter."""
    signed, n, power = dtype == torch.int8, *((127, 2) if dtype == torch.int8 else (255, 4))
    x = torch.tensor(values) if signed else torch.tensor(values).abs()
    most = x.abs().max().double()
    if most < 1e-20:
        return
    y = codes.decode(*codes.encode(x[None], dtype))[0].double()
    assert torch.equal(y.sign(), torch.where(y == 0, 0.0, x.double().sign()))
    far = ((x.double().abs() / most) ** (1 / power) - (y.abs() / most) ** (1 / power)).abs() * n
    half = 0.51 if signed else 0.76
    assert far.max() <= (half if signed else 1.01)  # what is larger than 0 has code 1 at least
    assert far[x.double().abs() > most * (0.5 / n) ** power].max() <= half
