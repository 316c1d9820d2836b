// One row for a tensor: all that an engine reads of it in a step. Filled by bound_plan.cpp; the
// CPU engine reads it, CUDA's spans are made of it, Triton sees it as 8-byte numbers. No torch
// here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codes.h"
#include "directions/all.h"
#include "precision.h"

namespace layerlr {

enum class DType : int64_t { f32, f64, bf16, f16 };

/// How an array's elements are stored, and what lies beside them (Array::aux). The formulas are in
/// layerlr/precision.py.
enum class Codec : int64_t {
  plain,       // as they are; nothing
  master,      // weights of 16 bits; the same ones in float32
  kahan,       // weights of 16 bits; what their rounding has lost, in their dtype
  stochastic,  // weights of 16 bits, rounded up or down at random (Row::seed); nothing
  bfloat16,    // state, rounded to the nearest bfloat16; nothing
  signed8,     // state in codes of 8 bits; a scale for each block of them (codes.h)
  unsigned8,   // the same of state that is never below 0
};

LAYERLR_HD constexpr bool has_scales(Codec codec) {
  return codec == Codec::signed8 || codec == Codec::unsigned8;
}

/// Bytes of an element of a parameter or gradient, and of the arithmetic.
LAYERLR_HD constexpr int param_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
LAYERLR_HD constexpr int state_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

/// Bytes of a stored element, `plain` of them without a codec.
LAYERLR_HD constexpr int stored_bytes(Codec codec, int plain) {
  return has_scales(codec) ? 1 : codec == Codec::bfloat16 ? 2 : plain;
}

/// What there is of codecs in a tensor's row: none, some, codes of 8 bits.
enum class Coding : int64_t { none, some, codes };

struct Array {
  void* data = nullptr;
  void* aux = nullptr;
  Codec codec = Codec::plain;

  /// The array without so many elements: whole blocks, of a tensor that has some.
  Array from(int64_t elements, int64_t block, int plain_bytes, DType dtype) const {
    Array rest = *this;
    if (elements == 0) return rest;
    if (data) rest.data = static_cast<char*>(data) + elements * stored_bytes(codec, plain_bytes);
    if (aux) rest.aux = static_cast<char*>(aux) + aux_bytes(elements, block, dtype);
    return rest;
  }

  /// Bytes that lie beside so many elements.
  int64_t aux_bytes(int64_t elements, int64_t block, DType dtype) const {
    return has_scales(codec)        ? elements / block * int64_t(sizeof(float))
           : codec == Codec::master ? elements * state_bytes(dtype)
           : codec == Codec::kahan  ? elements * param_bytes(dtype)
                                    : 0;
  }
};

struct Row {
  Array param, grad;  // without a gradient's data the tensor takes no part in this step
  Array state[max_states];
  void* step = nullptr;  // the count of steps taken, float32 or float64
  int64_t step_is_double = 0;
  int64_t seed = 0;            // of stochastic rounding
  int64_t block = code_block;  // elements that share a scale
  DType dtype = DType::f32;
  Coding coding = Coding::none;  // what coding_of() says of the arrays

  bool active() const { return grad.data; }
  /// Number of steps taken.
  double count() const {
    return step_is_double ? *static_cast<const double*>(step)
                          : static_cast<double>(*static_cast<const float*>(step));
  }
  void count_step() const {
    if (step_is_double) {
      *static_cast<double*>(step) += 1;
    } else {
      *static_cast<float*>(step) += 1;
    }
  }
};

inline Coding coding_of(const Row& row) {
  bool plain = row.param.codec == Codec::plain;
  for (const Array& s : row.state) {
    if (has_scales(s.codec)) return Coding::codes;
    plain &= s.codec == Codec::plain;
  }
  return plain ? Coding::none : Coding::some;
}

/// Call f(name, place) for the numbers of a row that Triton reads, for those of an array, and for
/// the end of a row.
template <class F>
void for_row_places(F f) {
#define LAYERLR_PLACE(struct, entry) f(#entry, offsetof(struct, entry) / 8)
  LAYERLR_PLACE(Row, param);
  LAYERLR_PLACE(Row, grad);
  LAYERLR_PLACE(Row, state);
  LAYERLR_PLACE(Row, step);
  LAYERLR_PLACE(Row, step_is_double);
  LAYERLR_PLACE(Row, seed);
  LAYERLR_PLACE(Row, block);
  LAYERLR_PLACE(Array, aux);
#undef LAYERLR_PLACE
  f("array", sizeof(Array) / 8);
  f("size", sizeof(Row) / 8);
}

}  // namespace layerlr
