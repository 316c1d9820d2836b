// State in codes of 8 bits: one formula for C++ (packs) and CUDA (numbers).
//
//   a block is up to 64 elements, as many as divide a row of dimension 0;  M = the largest |x| in
//   it signed     c = round(127 * |x/M|^(1/2)) with the sign of x       x = c*|c| * M/127^2
//   unsigned   c = round(255 *  (x/M)^(1/4)), at least 1 for x > 0   x = c^4   * M/255^4
//
// so that there are more codes near 0 than near M. To the bit, c is how many of the thresholds
// (k - 1/2)^2 or (k - 1/2)^4, k = 1, 2, ..., are reached by z = |x| * (127^2/M) or x * (255^4/M):
// that needs no exact root, which costs a GPU eleven instructions. What is stored beside a block is
// its scale, M/127^2 or M/255^4. A block whose M is below 2^-94 is stored as zeros. NaN makes the
// whole block NaN, an infinity leaves nothing finite in it.
#pragma once

#include "core.h"

namespace layerlr {

/// Elements of a block at most. Engines count elements with codes as if every block had so many.
constexpr int code_block = 64;

/// What z of the largest element of a block is.
constexpr float largest_signed = 16129, largest_unsigned = 4228250625.f;

/// What a block is encoded with, and what lies beside it.
struct BlockScale {
  float to_z, scale;

  LAYERLR_HD BlockScale(float largest, float z) {
    const bool counts = largest >= 0x1p-94f, finite = largest - largest == 0;
    to_z = counts && finite ? z / largest : 0.f;
    scale = largest < 0x1p-94f ? 0.f : largest * (1.f / z);
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
LAYERLR_HD V decode_signed(V c, float scale) {
  return (c * magnitude(c)) * scale;
}

template <class V>
LAYERLR_HD V encode_unsigned(V x, float to_z) {
  const V z = at_most(x * to_z, largest_unsigned);
  const V c = code_below(quick_root(quick_root(z))), half = c + 0.5f;
  const V square = half * half;
  return at_least_one_where_positive(x, add_one_where(z, square * square, c));
}
template <class V>
LAYERLR_HD V decode_unsigned(V c, float scale) {
  const V square = c * c;
  return (square * square) * scale;
}

}  // namespace layerlr
