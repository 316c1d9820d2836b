// The values that cross between directions, rules and engines. Included by C++ and CUDA alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <nv/target>
#define LAYERLR_HD __host__ __device__ __forceinline__
#define LAYERLR_OUTLINED inline __device__ __noinline__
#else
// Always inlined: the CPU kernels are compiled once for each instruction set, and an out-of-line
// copy shared between them could hold instructions that the machine lacks. Outlined: in an unnamed
// namespace only.
#define LAYERLR_HD inline __attribute__((always_inline))
#define LAYERLR_OUTLINED inline __attribute__((noinline))
#define LAYERLR_INLINED __attribute__((always_inline))  // of a lambda
#endif

namespace layerlr {

template <class To, class From>
LAYERLR_HD To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

/// Sums over one layer: w.w, g.g, u.u, w.u.
struct LayerStats {
  double ww = 0, gg = 0, uu = 0, wu = 0;
};

LAYERLR_HD LayerStats operator+(const LayerStats& x, const LayerStats& y) {
  return {x.ww + y.ww, x.gg + y.gg, x.uu + y.uu, x.wu + y.wu};
}

/// What a rule answers: u = direction(grad*g), w <- a*w + b*u; scale is for people to read.
struct LayerScale {
  double grad = 1, a = 1, b = 0, scale = 1;
};

// Scalar forms of the functions that directions call; cpu/vec.h has the vector forms.
LAYERLR_HD float root(float x) { return sqrtf(x); }
LAYERLR_HD double root(double x) { return sqrt(x); }

/// The states of an element as direction() reads them: s[k], and its root.
template <class V>
struct States {
  const V* x;

  LAYERLR_HD V operator[](int k) const { return x[k]; }
  LAYERLR_HD V root_of(int k) const { return root(x[k]); }
};

/// Whether the state of a direction can be in codes of 8 bits (codes.h).
template <template <class> class D>
constexpr bool takes_codes = D<float>::states > 0;

/// A number in twice the precision: the sum of both.
struct TwoDoubles {
  double high, low;
};
/// Dekker's product, which needs no fused add.
LAYERLR_HD TwoDoubles product(TwoDoubles x, TwoDoubles y) {
  const double split = 134217729;  // 2^27 + 1
  const double xs = x.high * split, xh = xs - (xs - x.high), xl = x.high - xh;
  const double ys = y.high * split, yh = ys - (ys - y.high), yl = y.high - yh;
  const double high = x.high * y.high;
  const double error = ((xh * yh - high) + xh * yl + xl * yh) + xl * yl;
  const double low = error + (x.high * y.low + x.low * y.high);
  const double sum = high + low;
  return {sum, low - (sum - high)};
}
/// x^n for a whole n >= 0 by squaring, in twice the precision, so that host and device form the
/// same bits: those of the exact power, rounded, but for rare ties.
LAYERLR_HD double power(double x, double n) {
  TwoDoubles result{1, 0}, square{x, 0};
  for (uint64_t k = static_cast<uint64_t>(n); k; k >>= 1) {
    if (k & 1) result = product(result, square);
    square = product(square, square);
  }
  return result.high + result.low;
}

/// The larger value; NaN where either is NaN, as torch.maximum.
template <class T>
LAYERLR_HD T larger(T x, T y) {
  return x >= y || x != x ? x : y;
}

LAYERLR_HD float magnitude(float x) { return fabsf(x); }
LAYERLR_HD float with_sign(float x, float of) { return copysignf(x, of); }

/// c, or 1 if that is more and x > 0; NaN counts as 0.
LAYERLR_HD float at_least_one_where_positive(float x, float c) {
  float least = x > 0 ? 1.f : 0.f;
#if defined(__CUDACC__)  // one instruction in place of two
  NV_IF_TARGET(NV_IS_DEVICE, (asm("set.gt.f32.f32 %0, %1, 0f00000000;" : "=f"(least) : "f"(x));))
#endif
  return fmaxf(c, least);
}

/// x, or rather the number in the middle of those that differ from it in their last bits only.
/// unit: the last of the bits that stay.
template <uint32_t unit>
LAYERLR_HD float middle(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t y = (bits & ~(unit - 1)) | unit / 2;
#if defined(__CUDACC__)  // one instruction in place of two
  NV_IF_TARGET(NV_IS_DEVICE, (asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(bits),
                                  "n"(~(unit - 1)), "r"(unit / 2));))
#endif
  return bit_cast<float>(y);
}

/// The root of x and the quotient x/y, correctly rounded, as a GPU's compiler finds them from the
/// guesses of its x^(-1/2) and 1/y, once it knows that nothing is tiny or huge: under the root x is
/// 2^-100 or more; y and the quotient are between 2^-126 and 2^126.
LAYERLR_HD float root_by(float guess, float x) {
  const float near = x * guess;
  return fmaf(fmaf(-near, near, x), guess * 0.5f, near);
}
LAYERLR_HD float quotient_by(float guess, float x, float y) {
  const float inverse = fmaf(guess, fmaf(-y, guess, 1.f), guess), near = x * inverse;
  return fmaf(inverse, fmaf(-y, near, x), near);
}

/// Root and quotient of such numbers, which a GPU need not ask about.
LAYERLR_HD float root_in_range(float x) {
#if defined(__CUDACC__)
  float guess;
  NV_IF_TARGET(NV_IS_DEVICE, (asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
                              return root_by(guess, x);))
#endif
  return sqrtf(x);
}
LAYERLR_HD float quotient_in_range(float x, float y) {
#if defined(__CUDACC__)
  float guess;
  NV_IF_TARGET(NV_IS_DEVICE, (asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(y));
                              return quotient_by(guess, x, y);))
#endif
  return x / y;
}

/// A square root that may be wrong by two ulp.
LAYERLR_HD float quick_root(float x) {
  float y = sqrtf(x);
#if defined(__CUDACC__)
  NV_IF_TARGET(NV_IS_DEVICE, (asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));))
#endif
  return y;
}

/// 1 above 0, -1 below, a zero or NaN as it is.
template <class T>
LAYERLR_HD T sign(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x;
}

}  // namespace layerlr
