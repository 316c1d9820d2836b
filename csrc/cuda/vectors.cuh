// Four elements of an array between global memory and registers.
#pragma once

#include <cfloat>
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

LAYERLR_DEVICE float widened(float x) { return x; }
LAYERLR_DEVICE double widened(double x) { return x; }
LAYERLR_DEVICE float widened(BFloat16 x) { return widen(x); }
LAYERLR_DEVICE float widened(Float16 x) { return widen(x); }
/// Byte i of a word as a number, by way of a float whose last bits it is: no conversion unit.
LAYERLR_DEVICE float byte_of(uint32_t word, int i, uint8_t) {
  return bit_cast<float>(device::byte_of_float(word, i)) - 8388608.f;
}
LAYERLR_DEVICE float byte_of(uint32_t word, int i, int8_t) {
  return bit_cast<float>(device::byte_of_float(word ^ 0x80808080u, i)) - (8388608.f + 128.f);
}
LAYERLR_DEVICE float widened(uint8_t c) { return byte_of(c, 0, c); }
LAYERLR_DEVICE float widened(int8_t c) { return byte_of(static_cast<uint8_t>(c), 0, c); }
/// The last byte of a number.
LAYERLR_DEVICE void narrowed(float x, uint8_t& to) {
  to = static_cast<uint8_t>(bit_cast<uint32_t>(x));
}
LAYERLR_DEVICE void narrowed(float x, float& to) { to = x; }
LAYERLR_DEVICE void narrowed(double x, double& to) { to = x; }
LAYERLR_DEVICE void narrowed(float x, BFloat16& to) { to = narrow_bf16(x); }
LAYERLR_DEVICE void narrowed(float x, Float16& to) { to = narrow_f16(x); }

/// A parameter type that is one of these: which, is asked at each access.
template <class... P>
struct OneOf {};

template <class P>
LAYERLR_DEVICE bool is_dtype(DType dtype) {
  return dtype == (std::is_same<P, float>::value      ? DType::f32
                   : std::is_same<P, BFloat16>::value ? DType::bf16
                                                      : DType::f16);
}
/// Call body(P()) with the type that a dtype means, one of these.
template <class Body, class P>
LAYERLR_DEVICE void with_type(OneOf<P>, DType, Body body) {
  body(P());
}
template <class Body, class P, class... Others>
LAYERLR_DEVICE void with_type(OneOf<P, Others...>, DType dtype, Body body) {
  if (is_dtype<P>(dtype)) {
    body(P());
  } else {
    with_type(OneOf<Others...>(), dtype, body);
  }
}
template <class Body, class P>
LAYERLR_DEVICE void with_type(P, DType, Body body) {
  body(P());
}

/// What one access moves: 16 bytes, or what four elements are if those are less.
template <class P>
struct Vector {
  static constexpr int n = sizeof(P) == 8 ? 2 : 4;
  struct alignas(n * sizeof(P)) Of {
    P x[n];
  };
};

/// Whether what is read or written is read again in this launch, was read before, or neither. What
/// was read for the last time may leave the L2 cache first; without anything to keep there the
/// plain accesses are the faster ones.
enum Use { again, last, once };

/// An argument that the compiler knows.
template <auto x>
struct Known {
  static constexpr auto value = x;
  LAYERLR_HD constexpr operator decltype(x)() const { return x; }
};

/// Elements [0, n) of the four at p; the others are zero. `whole` (a bool, or a Known one): all
/// four, in aligned vectors.
template <class Whole, class P, class T>
LAYERLR_DEVICE void load(Use use, Whole whole, const P* p, int n, T* x) {
  if (whole) {
    using V = typename Vector<P>::Of;
#pragma unroll
    for (int i = 0; i < 4; i += Vector<P>::n) {
      const V* from = reinterpret_cast<const V*>(p + i);
      const V v = use == last ? device::read_vector_last(from) : device::read_vector(from);
#pragma unroll
      for (int k = 0; k < Vector<P>::n; ++k) {
        if constexpr (sizeof(P) == 1) {
          x[k] = byte_of(bit_cast<uint32_t>(v), k, P());
        } else {
          x[i + k] = widened(v.x[k]);
        }
      }
    }
  } else {
    P narrow[4];  // all four, before any is waited for
#pragma unroll
    for (int i = 0; i < 4; ++i) narrow[i] = i < n ? device::read(p + i) : P();
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = widened(narrow[i]);
  }
}
template <class Whole, class P, class T>
LAYERLR_DEVICE void store(Use use, Whole whole, P* p, int n, const T* x) {
  if (whole) {
    using V = typename Vector<P>::Of;
#pragma unroll
    for (int i = 0; i < 4; i += Vector<P>::n) {
      V v;
#pragma unroll
      for (int k = 0; k < Vector<P>::n; ++k) narrowed(x[i + k], v.x[k]);
      V* to = reinterpret_cast<V*>(p + i);
      if (use == last) {
        device::write_vector_last(to, v);
      } else {
        device::write_vector(to, v);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < n) {
        P narrow;
        narrowed(x[i], narrow);
        device::write(p + i, narrow);
      }
    }
  }
}

LAYERLR_DEVICE bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }
LAYERLR_DEVICE bool is_finite(double x) { return fabs(x) <= DBL_MAX; }

/// moved + step; where the step is zero, moved to the bit, the sign of a zero too.
template <class T>
LAYERLR_DEVICE T add_step(T moved, T step) {
  return step == 0 ? moved : moved + step;
}

}  // namespace layerlr
