// Packs of 16 floats or 8 doubles, of whatever registers the file is compiled for. The lanes of a
// sum are the same for every instruction set, and so are its bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "core.h"
#include "precision.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace layerlr {
namespace {  // each instruction set's file has its own

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

constexpr int pack_bytes = 64;
constexpr int registers = pack_bytes / register_bytes;

template <class T>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(register_bytes)));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(register_bytes)));
};

/// 64 bytes of T with elementwise arithmetic, a rounding for each operation.
template <class T>
struct Pack {
  static constexpr int size = pack_bytes / sizeof(T);
  typename Register<T>::type v[registers];

  static Pack fill(T x) {
    Pack r;
    for (auto& reg : r.v) reg = x - typename Register<T>::type{};
    return r;
  }
};

#define LAYERLR_EACH(expression)                                                         \
  Pack<T> r;                                                                             \
  _Pragma("GCC unroll 4") for (int i = 0; i < registers; ++i) { r.v[i] = (expression); } \
  return r;

template <class T>
inline Pack<T> operator+(Pack<T> x, Pack<T> y) {
  LAYERLR_EACH(x.v[i] + y.v[i])
}
template <class T>
inline Pack<T> operator-(Pack<T> x, Pack<T> y) {
  LAYERLR_EACH(x.v[i] - y.v[i])
}
template <class T>
inline Pack<T> operator*(Pack<T> x, Pack<T> y) {
  LAYERLR_EACH(x.v[i] * y.v[i])
}
template <class T>
inline Pack<T> operator/(Pack<T> x, Pack<T> y) {
  LAYERLR_EACH(x.v[i] / y.v[i])
}
template <class T>
inline Pack<T> operator+(Pack<T> x, T y) {
  LAYERLR_EACH(x.v[i] + y)
}
template <class T>
inline Pack<T> operator-(Pack<T> x, T y) {
  LAYERLR_EACH(x.v[i] - y)
}
template <class T>
inline Pack<T> operator*(Pack<T> x, T y) {
  LAYERLR_EACH(x.v[i] * y)
}
template <class T>
inline Pack<T> larger(Pack<T> x, Pack<T> y) {
  LAYERLR_EACH(((x.v[i] >= y.v[i]) | (x.v[i] != x.v[i])) ? x.v[i] : y.v[i])
}
inline Pack<float> at_least_one_where_positive(Pack<float> x, Pack<float> c) {
  typedef float T;
  const auto one = Pack<T>::fill(1).v[0], zero = Pack<T>::fill(0).v[0];
  Pack<T> least;
  for (int i = 0; i < registers; ++i) least.v[i] = x.v[i] > zero ? one : zero;
  LAYERLR_EACH(c.v[i] > least.v[i] ? c.v[i] : least.v[i])
}
/// 1 above 0, -1 below, a zero or NaN as it is.
template <class T>
inline Pack<T> sign(Pack<T> x) {
  const auto one = Pack<T>::fill(1).v[0];
  LAYERLR_EACH(x.v[i] > 0 ? one : x.v[i] < 0 ? -one : x.v[i])
}
/// y where the gradient is finite (its difference to itself is 0), x elsewhere.
template <class T>
inline Pack<T> where_finite(Pack<T> g, Pack<T> y, Pack<T> x) {
  LAYERLR_EACH(g.v[i] - g.v[i] == 0 ? y.v[i] : x.v[i])
}
/// y where a equals b, x elsewhere.
template <class T>
inline Pack<T> where_equal(Pack<T> a, Pack<T> b, Pack<T> y, Pack<T> x) {
  LAYERLR_EACH(a.v[i] == b.v[i] ? y.v[i] : x.v[i])
}
/// moved + step; where the step is zero, moved to the bit, the sign of a zero too.
template <class T>
inline Pack<T> add_step(Pack<T> moved, Pack<T> step) {
  LAYERLR_EACH(step.v[i] == 0 ? moved.v[i] : moved.v[i] + step.v[i])
}
#undef LAYERLR_EACH

inline Pack<float> root(Pack<float> x) {
  Pack<float> r;
#if defined(__AVX512F__)
  r.v[0] = _mm512_sqrt_ps(x.v[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < registers; ++i) r.v[i] = _mm256_sqrt_ps(x.v[i]);
#else
  for (int i = 0; i < registers; ++i)
    for (int k = 0; k < 4; ++k) r.v[i][k] = sqrtf(x.v[i][k]);
#endif
  return r;
}
/// A root that may be wrong by two ulp: the processor's guess of 1/sqrt(x), and a step of Newton's.
inline Pack<float> quick_root(Pack<float> x) {
#if defined(__AVX512F__)
  const __m512 z = _mm512_max_ps(x.v[0], _mm512_set1_ps(1e-30f));  // 0 has no reciprocal
  const __m512 guess = _mm512_rsqrt14_ps(z), near = z * guess, half = _mm512_set1_ps(0.5f);
  const __m512 off = _mm512_fnmadd_ps(near, guess * half, half);
  return {{_mm512_fmadd_ps(near, off, near)}};
#elif defined(__AVX2__)
  for (auto& r : x.v) {
    const __m256 z = _mm256_max_ps(r, _mm256_set1_ps(1e-30f));
    const __m256 guess = _mm256_rsqrt_ps(z), near = z * guess, half = _mm256_set1_ps(0.5f);
    r = _mm256_fmadd_ps(near, _mm256_fnmadd_ps(near, guess * half, half), near);
  }
  return x;
#else
  return root(x);
#endif
}
inline Pack<double> root(Pack<double> x) {
  Pack<double> r;
#if defined(__AVX512F__)
  r.v[0] = _mm512_sqrt_pd(x.v[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < registers; ++i) r.v[i] = _mm256_sqrt_pd(x.v[i]);
#else
  for (int i = 0; i < registers; ++i)
    for (int k = 0; k < 2; ++k) r.v[i][k] = sqrt(x.v[i][k]);
#endif
  return r;
}

typedef uint32_t Bits __attribute__((vector_size(register_bytes)));
constexpr uint32_t sign_bit = 0x80000000u;

inline Pack<float> magnitude(Pack<float> x) {
  for (auto& r : x.v) r = (Register<float>::type)((Bits)r & ~sign_bit);
  return x;
}
inline Pack<float> with_sign(Pack<float> x, Pack<float> of) {
  for (int i = 0; i < registers; ++i) {
    x.v[i] = (Register<float>::type)((Bits)x.v[i] | ((Bits)of.v[i] & sign_bit));
  }
  return x;
}
template <uint32_t unit>
inline Pack<float> middle(Pack<float> x) {
  for (auto& r : x.v) r = (Register<float>::type)(((Bits)r & ~(unit - 1)) | unit / 2);
  return x;
}
/// x rounded up or down to bfloat16s, the first of them at a place of its tensor.
inline Pack<float> at_random(Pack<float> x, uint32_t key, uint32_t place) {
  constexpr int lanes = register_bytes / 4;
  Bits lane;
  for (int k = 0; k < lanes; ++k) lane[k] = k;
  Pack<float> r;
  for (int i = 0; i < registers; ++i) {
    const Bits at = lane + (place + i * lanes);
    const auto up = (Register<float>::type)round_at_random((Bits)x.v[i], key, at);
    r.v[i] = x.v[i] == x.v[i] ? up : x.v[i];
  }
  return r;
}

// -- memory: cpu/memory.h has the other dtypes, and parts of packs
// ---------------------------------

template <class T>
inline Pack<T> load(const T* p) {
  Pack<T> r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
template <class T>
inline void store(T* p, Pack<T> x) {
  std::memcpy(p, &x, sizeof x);
}

// -- sums in float64 ---------------------------------------------------------------------------

/// A pack in double, lane i of half h being element 8*h + i.
template <class T>
struct Wide;
template <>
struct Wide<float> {
  static constexpr int halves = 2;
  Pack<double> half[2];
  explicit Wide(Pack<float> x) {
#if defined(__AVX512F__)
    half[0].v[0] = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v[0]));
    half[1].v[0] = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v[0], 1));
#elif defined(__AVX2__)
    for (int h = 0; h < 2; ++h) {
      half[h].v[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v[h]));
      half[h].v[1] = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v[h], 1));
    }
#else
    for (int i = 0; i < 16; ++i) half[i / 8].v[i % 8 / 2][i % 2] = x.v[i / 4][i % 4];
#endif
  }
};
template <>
struct Wide<double> {
  static constexpr int halves = 1;
  Pack<double> half[1];
  explicit Wide(Pack<double> x) : half{x} {}
};

/// One running sum, a lane for each lane of a pack.
template <class T>
struct Sum {
  Pack<double> lanes[Wide<T>::halves];

  Sum() {
    for (auto& lane : lanes) lane = Pack<double>::fill(0);
  }
  void add(const Wide<T>& x, const Wide<T>& y) {
    for (int h = 0; h < Wide<T>::halves; ++h) {
#if defined(__AVX512F__)
      // products of floats are exact in double, so a fused add rounds the same; doubles: see below
      if constexpr (Wide<T>::halves == 2) {
        lanes[h].v[0] = _mm512_fmadd_pd(x.half[h].v[0], y.half[h].v[0], lanes[h].v[0]);
        continue;
      }
#elif defined(__AVX2__)
      if constexpr (Wide<T>::halves == 2) {
        for (int i = 0; i < 2; ++i)
          lanes[h].v[i] = _mm256_fmadd_pd(x.half[h].v[i], y.half[h].v[i], lanes[h].v[i]);
        continue;
      }
#endif
      lanes[h] = lanes[h] + x.half[h] * y.half[h];
    }
  }
  double total() const {
    Pack<double> all = lanes[0];
    for (int h = 1; h < Wide<T>::halves; ++h) all = all + lanes[h];
    // halves onto each other, in every instruction set
#if defined(__AVX512F__)
    const __m256d four = _mm512_castpd512_pd256(all.v[0]) + _mm512_extractf64x4_pd(all.v[0], 1);
#elif defined(__AVX2__)
    const __m256d four = all.v[0] + all.v[1];
#endif
#if defined(__AVX2__)
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
#else
    double d[8];
    store(d, all);
    return ((d[0] + d[4]) + (d[2] + d[6])) + ((d[1] + d[5]) + (d[3] + d[7]));
#endif
  }
};

}  // namespace
}  // namespace layerlr
