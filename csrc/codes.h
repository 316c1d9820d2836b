// State in codes of 8 bits: one formula for C++ (packs) and CUDA (numbers).
//
//   a block is 64 elements of a row of dimension 0;  M = the largest |x| in it
//   signed     c = round(127 * |x/M|^(1/2)) with the sign of x       x = c*|c| * M/127^2
//   unsigned   c = round(255 *  (x/M)^(1/4)), at least 1 for x > 0   x = c^4   * M/255^4
//
// so that there are more codes near 0 than near M. What is stored beside a block is its scale, M
// times the constant. A block whose M is below 2^-94 is stored as zeros. An infinite value stays
// one, the finite ones beside it become NaN, and NaN makes the whole block NaN.
#pragma once

#include "core.h"

namespace layerlr {

constexpr int code_block = 64;

/// What a block is encoded with: 1/M, and what lies beside it.
struct BlockScale {
  float inverse, scale;

  LAYERLR_HD BlockScale(float largest, bool is_signed) {
    const bool counts = largest >= 0x1p-94f, finite = largest - largest == 0;
    inverse = counts && finite ? 1.f / largest : 0.f;
    scale = largest < 0x1p-94f ? 0.f : largest * (is_signed ? 1.f / 16129.f : 1.f / 4228250625.f);
  }
};

/// The nearest whole number to 0 <= |x| < 2^22, ties to even; never -0.
template <class V>
LAYERLR_HD V rounded(V x) {
  return (x + 12582912.f) - 12582912.f;  // 3 * 2^22: what is below 1 is rounded away
}

template <class V>
LAYERLR_HD V encode_signed(V x, float inverse) {
  const V part = root(at_most_one(magnitude(x) * inverse));
  return rounded(with_sign(part * 127.f, x));
}
template <class V>
LAYERLR_HD V decode_signed(V c, float scale) {
  return (c * magnitude(c)) * scale;
}

template <class V>
LAYERLR_HD V encode_unsigned(V x, float inverse) {
  const V part = root(root(at_most_one(x * inverse)));
  return larger(rounded(part * 255.f), sign(x));
}
template <class V>
LAYERLR_HD V decode_unsigned(V c, float scale) {
  const V square = c * c;
  return (square * square) * scale;
}

}  // namespace layerlr
