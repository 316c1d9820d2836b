// bfloat16 and float16 as bits, and their conversions, one element at a time.
#pragma once

#include "core.h"

namespace layerlr {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LAYERLR_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
/// Round to nearest, ties to even; a NaN becomes the quiet NaN that torch stores.
LAYERLR_HD BFloat16 narrow_bf16(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(f != f ? 0x7fc0u : rounded)};
}

LAYERLR_HD float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    bits = 0x7f800000u | (magnitude << 13);
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude + 0x1c000u) << 13;
  } else {  // subnormal: exact in float
    bits = bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return bit_cast<float>(bits | sign);
}
LAYERLR_HD Float16 narrow_f16(float f) {
  const uint32_t all = bit_cast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((all >> 16) & 0x8000u);
  const uint32_t bits = all & 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to above the largest half
    half = 0x7c00u;
  } else if (bits >= 0x38800000u) {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the last place, the hardware rounds
    half = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace layerlr
