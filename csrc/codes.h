// State in codes of 8 bits: one formula for C++ (packs) and CUDA (numbers).
//
//   a block is up to 64 elements, as many as divide a row of dimension 0; M is its largest |x|
//
//   signed    c = round(127 * |x/M|^(1/2)), with the sign of x     k = M/127^2        x = c*|c|*k
//   unsigned  c = round(255 * (x/M)^(1/4)), at least 1 for x > 0   k = M^(1/2)/255^2  x = (c*c*k)^2
//
// so that there are more codes near 0 than near M. To the bit, c is how many of the thresholds
// (i - 1/2)^2 or (i - 1/2)^4, i = 1, 2, ..., are reached by z = |x| * (127^2/M) or x * (255^4/M):
// that needs no exact root, which costs a GPU eleven instructions. What is stored beside a block is
// its scale k. A block whose M is below 2^-94 is stored as zeros. NaN makes the whole block NaN, an
// infinity leaves nothing finite in it.
//
// Who wants the root of an unsigned x has it: the rounded square of r = c*c*k has the root r, to
// the bit, as long as it is a normal number (which 2^-94 and `largest_root` see to). So what is
// decoded is held as c*|c|*k or c*c*k, and `Held` knows whose square is meant.
#pragma once

#include "core.h"

namespace layerlr {

/// Elements of a block at most. Engines count elements with codes as if every block had so many.
constexpr int code_block = 64;

/// What z of the largest element of a block is.
constexpr float largest_signed = 16129, largest_unsigned = 4228250625.f;

/// Roots above it count as it: three roundings later the square must not be infinite.
constexpr float largest_root = 0x1.fffff8p63f;

/// What a block is encoded with, and what lies beside it.
struct BlockScale {
  float to_z, scale;

  BlockScale() = default;
  LAYERLR_HD BlockScale(float largest, bool nonnegative) {
    const bool counts = largest >= 0x1p-94f, finite = largest - largest == 0;
    to_z = counts && finite ? (nonnegative ? largest_unsigned : largest_signed) / largest : 0.f;
    const float held = nonnegative && finite ? at_most(root(largest), largest_root) : largest;
    scale = largest < 0x1p-94f ? 0.f : held * (nonnegative ? 1 / 65025.f : 1 / 16129.f);
  }
};

/// A little less than 1: a root that is wrong by an ulp or two ends below a threshold, not above.
constexpr float just_below = 1 - 0x1p-18f;

/// The code of a root, 0 <= root < 2^22, or one less.
template <class V>
LAYERLR_HD V code_below(V root) {
  constexpr float whole = 12582912;  // 3 * 2^22: what is below 1 is rounded away
  return about_sum(root, just_below, whole) - whole;
}

template <class V>
LAYERLR_HD V encode_signed(V x, float to_z) {
  const V z = at_most(magnitude(x) * to_z, largest_signed);
  const V c = code_below(quick_root(z)), half = c + 0.5f;
  return with_sign(add_one_where(z, half * half, c), x);
}

template <class V>
LAYERLR_HD V encode_unsigned(V x, float to_z) {
  const V z = at_most(x * to_z, largest_unsigned);
  const V c = code_below(quick_root(quick_root(z))), half = c + 0.5f;
  const V square = half * half;
  return at_least_one_where_positive(x, add_one_where(z, square * square, c));
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
