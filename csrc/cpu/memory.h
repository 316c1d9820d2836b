// Loads and stores of packs in every parameter dtype, and of the last few elements of a tensor.
#pragma once

#include "cpu/vec.h"
#include "half.h"

namespace layerlr {
namespace {

template <class P>
struct Arithmetic {
  typedef float type;
};
template <>
struct Arithmetic<double> {
  typedef double type;
};

// -- codes of 8 bits ------------------------------------------------------------------------------

/// The largest |x|, or NaN where there is one: of numbers without a sign the bits are in order.
struct Largest {
  Bits bits[registers] = {};

  void add(Pack<float> x) {
    for (int i = 0; i < registers; ++i) {
      const Bits now = (Bits)x.v[i] & ~sign_bit;
      bits[i] = now > bits[i] ? now : bits[i];
    }
  }
  float total() const {
#if defined(__AVX512F__)
    const uint32_t most = _mm512_reduce_max_epu32((__m512i)bits[0]);
#else
    uint32_t all[16], most = 0;
    std::memcpy(all, bits, sizeof all);
    for (const uint32_t b : all) most = b > most ? b : most;
#endif
    float x;
    std::memcpy(&x, &most, sizeof x);
    return x;
  }
};

#if defined(__AVX512F__)
inline Pack<float> load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {{_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}};
}
inline Pack<float> load(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {{_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))}};
}
/// The last byte of each number.
inline void store_code(uint8_t* p, Pack<float> x) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(x.v[0]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
#else
template <class Byte>
inline Pack<float> load_code(const Byte* p) {
  float f[16];
  for (int i = 0; i < 16; ++i) f[i] = p[i];
  return load(f);
}
inline Pack<float> load(const int8_t* p) { return load_code(p); }
inline Pack<float> load(const uint8_t* p) { return load_code(p); }
/// The last byte of each number.
inline void store_code(uint8_t* p, Pack<float> x) {
  uint32_t bits[16];
  std::memcpy(bits, x.v, sizeof bits);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(bits[i]);
}
#endif

#if defined(__AVX512F__)
inline Pack<float> load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))}};
}
/// Round to nearest, ties to even; a NaN becomes the quiet NaN that torch stores.
inline void store(BFloat16* p, Pack<float> x) {
  const __m512i bits = _mm512_castps_si512(x.v[0]);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  up = _mm512_srli_epi32(up, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v[0], x.v[0], _CMP_UNORD_Q);
  up = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(up));
}
inline Pack<float> load(const Float16* p) {
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}};
}
inline void store(Float16* p, Pack<float> x) {
  const __m256i half = _mm512_cvtps_ph(x.v[0], _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
#elif defined(__AVX2__)
inline Pack<float> load(const BFloat16* p) {
  Pack<float> r;
  for (int i = 0; i < 2; ++i) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
    r.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  return r;
}
/// Round to nearest, ties to even; a NaN becomes the quiet NaN that torch stores.
inline void store(BFloat16* p, Pack<float> x) {
  __m256i up[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(x.v[i]);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    up[i] = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    up[i] = _mm256_srli_epi32(up[i], 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v[i], x.v[i], _CMP_UNORD_Q));
    up[i] = _mm256_blendv_epi8(up[i], _mm256_set1_epi32(0x7fc0), nan);
  }
  const __m256i packed = _mm256_packus_epi32(up[0], up[1]);  // by 128-bit halves: 0 2 1 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline Pack<float> load(const Float16* p) {
  Pack<float> r;
  for (int i = 0; i < 2; ++i) {
    r.v[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
  }
  return r;
}
inline void store(Float16* p, Pack<float> x) {
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i,
                     _mm256_cvtps_ph(x.v[i], _MM_FROUND_TO_NEAREST_INT));
  }
}
#else
inline Pack<float> load(const BFloat16* p) {
  float f[16];
  for (int i = 0; i < 16; ++i) f[i] = widen(p[i]);
  return load(f);
}
inline void store(BFloat16* p, Pack<float> x) {
  float f[16];
  store(f, x);
  for (int i = 0; i < 16; ++i) p[i] = narrow_bf16(f[i]);
}

// Too long to be written out wherever a kernel reads or writes.
LAYERLR_OUTLINED Pack<float> load(const Float16* p) {
  float f[16];
  for (int i = 0; i < 16; ++i) f[i] = widen(p[i]);
  return load(f);
}
LAYERLR_OUTLINED void store(Float16* p, Pack<float> x) {
  float f[16];
  store(f, x);
  for (int i = 0; i < 16; ++i) p[i] = narrow_f16(f[i]);
}
#endif

/// x rounded to P.
template <class P>
inline Pack<float> nearest(Pack<float> x) {
  P room[Pack<float>::size];
  store(room, x);
  return load(room);
}
template <>
inline Pack<float> nearest<BFloat16>(Pack<float> x) {
  Pack<float> r;
  for (int i = 0; i < registers; ++i) {
    const Bits bits = (Bits)x.v[i];
    const Bits up = (bits + (((bits >> 16) & 1u) + 0x7fffu)) & 0xffff0000u;
    r.v[i] = x.v[i] == x.v[i] ? (Register<float>::type)up : x.v[i];
  }
  return r;
}

// -- the last n elements of a tensor: the other lanes are zero, and are not written ---------------

template <class P>
inline auto load_part(const P* p, int64_t n) {
  P room[pack_bytes / sizeof(typename Arithmetic<P>::type)] = {};
  std::memcpy(room, p, n * sizeof(P));
  return load(room);
}
template <class P, class V>
inline void store_part(P* p, V x, int64_t n) {
  P room[pack_bytes / sizeof(typename Arithmetic<P>::type)];
  store(room, x);
  std::memcpy(p, room, n * sizeof(P));
}
template <class T>
inline Pack<T> first_lanes(Pack<T> x, int64_t n) {
  T room[Pack<T>::size], kept[Pack<T>::size] = {};
  store(room, x);
  std::memcpy(kept, room, n * sizeof(T));
  return load(kept);
}
// tiny tensors are nothing but a tail: masks spare them the trip through memory
#if defined(__AVX512F__)
inline __mmask16 lanes16(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline __mmask8 lanes8(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
inline Pack<float> load_part(const float* p, int64_t n) {
  return {{_mm512_maskz_loadu_ps(lanes16(n), p)}};
}
inline Pack<double> load_part(const double* p, int64_t n) {
  return {{_mm512_maskz_loadu_pd(lanes8(n), p)}};
}
inline void store_part(float* p, Pack<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, lanes16(n), x.v[0]);
}
inline void store_part(double* p, Pack<double> x, int64_t n) {
  _mm512_mask_storeu_pd(p, lanes8(n), x.v[0]);
}
inline Pack<float> first_lanes(Pack<float> x, int64_t n) {
  return {{_mm512_maskz_mov_ps(lanes16(n), x.v[0])}};
}
inline Pack<double> first_lanes(Pack<double> x, int64_t n) {
  return {{_mm512_maskz_mov_pd(lanes8(n), x.v[0])}};
}
#elif defined(__AVX2__)
inline __m256i lanes8(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline __m256i lanes4(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Pack<float> load_part(const float* p, int64_t n) {
  return {{_mm256_maskload_ps(p, lanes8(n)), _mm256_maskload_ps(p + 8, lanes8(n - 8))}};
}
inline Pack<double> load_part(const double* p, int64_t n) {
  return {{_mm256_maskload_pd(p, lanes4(n)), _mm256_maskload_pd(p + 4, lanes4(n - 4))}};
}
inline void store_part(float* p, Pack<float> x, int64_t n) {
  _mm256_maskstore_ps(p, lanes8(n), x.v[0]);
  _mm256_maskstore_ps(p + 8, lanes8(n - 8), x.v[1]);
}
inline void store_part(double* p, Pack<double> x, int64_t n) {
  _mm256_maskstore_pd(p, lanes4(n), x.v[0]);
  _mm256_maskstore_pd(p + 4, lanes4(n - 4), x.v[1]);
}
inline Pack<float> first_lanes(Pack<float> x, int64_t n) {
  return {{_mm256_and_ps(x.v[0], _mm256_castsi256_ps(lanes8(n))),
           _mm256_and_ps(x.v[1], _mm256_castsi256_ps(lanes8(n - 8)))}};
}
inline Pack<double> first_lanes(Pack<double> x, int64_t n) {
  return {{_mm256_and_pd(x.v[0], _mm256_castsi256_pd(lanes4(n))),
           _mm256_and_pd(x.v[1], _mm256_castsi256_pd(lanes4(n - 4)))}};
}
#endif

}  // namespace
}  // namespace layerlr
