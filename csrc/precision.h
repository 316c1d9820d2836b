// Random bits for 16-bit weights: layerlr/precision.py says it all.
#pragma once

#include "core.h"

namespace layerlr {

/// The n-th number that the generator SplitMix64 draws from a seed.
LAYERLR_HD uint64_t splitmix64(uint64_t seed, uint64_t n) {
  uint64_t x = seed + n * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// What step t mixes into the places of a tensor's elements.
LAYERLR_HD uint32_t rounding_key(int64_t seed, double t) {
  return static_cast<uint32_t>(splitmix64(static_cast<uint64_t>(seed), static_cast<uint64_t>(t)) >>
                               32);
}

/// The finaliser of MurmurHash3, for one number or for several.
template <class U>
LAYERLR_HD U fmix32(U x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

/// Bits of a float, rounded up or down to those of a bfloat16; not for NaN.
template <class U>
LAYERLR_HD U round_at_random(U bits, uint32_t key, U place) {
  return (bits + (fmix32(key ^ place) >> 16)) & 0xffff0000u;
}

}  // namespace layerlr
