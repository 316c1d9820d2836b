// The values that cross between directions, rules and engines. Included by C++ and CUDA alike.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LAYERLR_HD __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are compiled once for each instruction set, and an out-of-line
// copy shared between them could hold instructions that the machine lacks.
#define LAYERLR_HD inline __attribute__((always_inline))
#endif

namespace layerlr {

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

/// The larger value; NaN where either is NaN, as torch.maximum.
template <class T>
LAYERLR_HD T larger(T x, T y) {
  return x >= y || x != x ? x : y;
}

}  // namespace layerlr
