// A tile between global and shared memory, in 16-byte granules wherever it begins, and its elements
// in shared memory.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/tables.h"
#include "half.h"

namespace layerlr {

/// Arithmetic type of a parameter type.
template <class P>
struct Wide {
  typedef float type;
};
template <>
struct Wide<double> {
  typedef double type;
};

/// Bytes from the last 16-byte border to p. A tile lies as far from one in shared memory as it does
/// in global memory, so that granules fit.
LAYERLR_DEVICE int shift(const void* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15);
}

/// Every element is a whole number of these.
typedef uint16_t Unit;

/// Call whole(offset) for each 16-byte granule that lies within [shift, shift + bytes), and
/// part(offset) for each unit of the two at the ends that do not.
template <class Whole, class Part>
LAYERLR_DEVICE void granules(int shift, int bytes, Whole whole, Part part) {
  const int end = shift + bytes;
  for (int q = threadIdx.x * 16; q < end; q += tile_threads * 16) {
    if (q >= shift && q + 16 <= end) {
      whole(q);
    } else {
      const int stop = q + 16 < end ? q + 16 : end;
#pragma unroll 1
      for (int i = q < shift ? shift : q; i < stop; i += sizeof(Unit)) part(i);
    }
  }
}

/// Begin to copy a tile of so many bytes from global memory to its place in shared memory.
LAYERLR_DEVICE void fetch(char* place, const char* from, int bytes) {
  const int off = shift(from);
  const char* base = from - off;
  granules(
      off, bytes, [&](int q) { device::copy_async(place + q, base + q); },
      [&](int i) {
        *device::in_shared(reinterpret_cast<Unit*>(place + i)) =
            device::read(reinterpret_cast<const Unit*>(base + i));
      });
}

/// Write a tile from shared memory back.
LAYERLR_DEVICE void drain(const char* place, char* to, int bytes) {
  const int off = shift(to);
  char* base = to - off;
  granules(
      off, bytes,
      [&](int q) {
        device::write(reinterpret_cast<device::Granule*>(base + q),
                      *device::in_shared(reinterpret_cast<const device::Granule*>(place + q)));
      },
      [&](int i) {
        device::write(reinterpret_cast<Unit*>(base + i),
                      *device::in_shared(reinterpret_cast<const Unit*>(place + i)));
      });
}

// -- elements in shared memory --------------------------------------------------------------------

LAYERLR_DEVICE float widened(float x) { return x; }
LAYERLR_DEVICE double widened(double x) { return x; }
LAYERLR_DEVICE float widened(BFloat16 x) { return widen(x); }
LAYERLR_DEVICE float widened(Float16 x) { return widen(x); }
LAYERLR_DEVICE void narrowed(float x, float& to) { to = x; }
LAYERLR_DEVICE void narrowed(double x, double& to) { to = x; }
LAYERLR_DEVICE void narrowed(float x, BFloat16& to) { to = narrow_bf16(x); }
LAYERLR_DEVICE void narrowed(float x, Float16& to) { to = narrow_f16(x); }

template <class P>
struct alignas(4 * sizeof(P) < 16 ? 4 * sizeof(P) : 16) Four {
  P x[4];
};

/// Elements [0, n) of four; the others are zero. `Whole`: all four, in aligned vectors.
template <class Whole, class P, class T>
LAYERLR_DEVICE void load(Whole, const P* p, int n, T* x) {
  p = device::in_shared(p);
  if constexpr (Whole::value) {
    const Four<P> four = *reinterpret_cast<const Four<P>*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = widened(four.x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < n ? widened(p[i]) : T(0);
  }
}
template <class Whole, class P, class T>
LAYERLR_DEVICE void store(Whole, P* p, int n, const T* x) {
  p = device::in_shared(p);
  if constexpr (Whole::value) {
    Four<P> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) narrowed(x[i], four.x[i]);
    *reinterpret_cast<Four<P>*>(p) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < n) narrowed(x[i], p[i]);
    }
  }
}

/// Call body(whole, element, n) for each of this thread's vectors of four, n of whose elements
/// exist. `aligned`: every array of the tile begins at a vector; a full tile of such is most of a
/// model, and has straight code.
template <class T, class Body>
LAYERLR_DEVICE void vectors(int count, bool aligned, Body body) {
  constexpr int each = sizeof(T) == 8 ? 1 : 2;
  const int first = static_cast<int>(threadIdx.x) * 4;
  if (aligned && count == each * tile_threads * 4) {
#pragma unroll
    for (int v = 0; v < each; ++v) body(std::true_type(), v * tile_threads * 4 + first, 4);
  } else {
#pragma unroll 1
    for (int e = first; e < count; e += tile_threads * 4) {
      body(std::false_type(), e, count - e < 4 ? count - e : 4);
    }
  }
}

}  // namespace layerlr
