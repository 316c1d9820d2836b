// The elementwise kernels of one direction and dtype, as function pointers.
#pragma once

#include "codes.h"
#include "plan.h"

namespace layerlr {

/// Part of a tensor, and what is done to it.
struct Piece {
  Array w, g, s[max_states];
  int64_t n;
  DType dtype;                      // of weights and gradients
  int64_t block;                    // elements that share a scale
  const void* direction = nullptr;  // the direction's scalars
  double grad_factor;               // on the gradient
  double l2;
  bool skip;                    // an element with a bad gradient keeps its state
  uint32_t key = 0, place = 0;  // of stochastic rounding: the step's, the first element's
};

/// What a gradient rule measures before it scales.
struct Measure {
  bool ww, raw;
};

struct Kernels {
  int states;
  bool first_order;

  /// Form the direction's scalars for step t in 64 bytes of room.
  void (*make)(void* room, const double* hyper, double t);
  double (*rate)(const double* hyper, double t);
  /// gg, and ww where it is asked for; state untouched.
  LayerStats (*measure)(const Piece&, Measure);
  /// Advance the state with g and sum all four.
  LayerStats (*advance)(const Piece&);
  /// w <- a*w + b*u from the state as it is.
  void (*apply)(const Piece&, const LayerScale&);
  /// Advance with grad*g and apply.
  void (*advance_apply)(const Piece&, const LayerScale&);
  /// The same, and sum ww, uu, wu.
  LayerStats (*advance_apply_measured)(const Piece&, const LayerScale&);
};

constexpr int direction_room = 64;

/// A direction's, by how states are held and by dtype.
struct DirectionKernels {
  const Kernels* of[3][4];
};

/// What the kernels are compiled for: any processor of the architecture, or those that have more.
enum class Isa { any, avx2, avx512 };

/// Each is in a file of its own.
template <Isa isa, template <class> class D>
const DirectionKernels& kernels_of();

/// Kernels of a direction and dtype for the instruction set that was chosen at load.
const Kernels& kernels_for(int direction, DType dtype, Coding coding);

/// Name of that instruction set: "avx512", "avx2" or "default".
const char* instruction_set();

/// Choose another instruction set, for tests; false where this machine lacks it.
bool use_instruction_set(const char* name);

}  // namespace layerlr
