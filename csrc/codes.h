// State in codes of 8 bits: one formula for C++ (packs) and CUDA (numbers).
//
//   a block is up to 64 elements, as many as divide a row of dimension 0; M is its largest |x|, or
//   2^-94 if that is more
//
//   signed    c = round(127 * |x/M|^(1/2)), with the sign of x     k = M/127^2        x = c*|c|*k
//   unsigned  c = round(255 * (x/M)^(1/4)), at least 1 for x > 0   k = M^(1/2)/255^2  x = (c*c*k)^2
//
// so that there are more codes near 0 than near M. What is stored beside a block is its scale k. A
// block with a number of 2^126 or more, or NaN, has NaN there, and its codes mean nothing.
//
// To the bit: z = |x| * (127^2/M) or x * (255^4/M) is put in the middle of the numbers that begin
// with the same 16 bits (unsigned: 8). There it is far enough from every number at which codes
// change that any root which is right to 19 bits ends at the same code; an exact one costs a GPU
// eleven instructions.
//
// Who wants the root of an unsigned x has it: the rounded square of r = c*c*k has the root r, to
// the bit, as long as it is a normal number, which the least M sees to. So what is decoded is
// held as c*|c|*k or c*c*k, and `Held` knows whose square is meant.
#pragma once

#include "core.h"

namespace layerlr {

/// Elements of a block at most. Engines count elements with codes as if every block had so many.
constexpr int code_block = 64;

/// What a block is encoded with, and what lies beside it.
struct BlockScale {
  float to_z, scale;

  BlockScale() = default;
  LAYERLR_HD BlockScale(float largest, bool nonnegative) {
    const float m = largest > 0x1p-94f ? largest : 0x1p-94f;
    const float whole = root_in_range(m), held = nonnegative ? whole : m;
    // 2^-16 on both: their quotient is the same, and in range
    to_z = quotient_in_range((nonnegative ? 4228250625.f : 16129.f) * 0x1p-16f, m * 0x1p-16f);
    const float nothing = largest * 4 - largest * 4;  // NaN from 2^126 on
    scale = held * (nonnegative ? 1 / 65025.f : 1 / 16129.f) + nothing;
  }
};

/// A code is made as this number plus it: the last byte of that float is the code.
constexpr float shift_of_codes = 12582912;  // 3 * 2^22

template <class V>
LAYERLR_HD V encode_signed(V x, float to_z) {
  const V c = quick_root(middle<0x100>(magnitude(x) * to_z));
  return with_sign(c, x) + shift_of_codes;
}

template <class V>
LAYERLR_HD V encode_unsigned(V x, float to_z) {
  const V c = quick_root(quick_root(middle<0x10000>(x * to_z)));
  return at_least_one_where_positive(x, c) + shift_of_codes;
}

/// What is held of a code, signed or not: x itself, or its root.
template <class V>
LAYERLR_HD V decode(V c, float scale) {
  return (c * magnitude(c)) * scale;
}

/// The states of direction D as `decode` leaves them.
template <class D, class V>
struct Held {
  const V* x;

  LAYERLR_HD V operator[](int k) const { return D::nonnegative(k) ? x[k] * x[k] : x[k]; }
  LAYERLR_HD V root_of(int k) const { return D::nonnegative(k) ? x[k] : root(x[k]); }
};

}  // namespace layerlr
