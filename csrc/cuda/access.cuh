// The elements of an item as they are stored: weights, gradients, states.
#pragma once

#include "cuda/vectors.cuh"

namespace layerlr {

/// Where the arrays of an item begin, how many elements it has, and how they are stored.
struct Arrays {
  char* of[arrays];
  int count;     // of elements, where there are codes as if blocks were whole
  int block;     // elements that share a scale
  DType dtype;   // of the parameter
  bool aligned;  // every array begins at a vector
  bool narrow;   // states are bfloat16
  bool codes;    // states are codes of 8 bits
  Codec weights;
  uint32_t key, place;  // of stochastic rounding: the step's, the first element's
};

/// What a step does to every gradient.
struct Gradient {
  double sign, l2;
  bool decays;   // l2 is not 0
  bool raw;      // the rule measures it before L2 decay
  bool weights;  // the first pass of a gradient rule reads them
  bool skip;     // an element with a bad gradient keeps its state
};

/// Access to elements of direction D and parameter type P. `coded`: weights and states may have
/// codecs. Of what is passed along, `codes` says that those of the states are codes of 8 bits,
/// `whole` that vectors are aligned and have four elements.
template <template <class> class D, class P, bool coded>
struct Access {
  static constexpr bool coded_weights = coded && !std::is_same<P, float>::value;
  using T = typename Wide<P>::type;
  static constexpr int states = D<T>::states;

  const Arrays& at;
  const D<T>& d;
  const Gradient& how;
  const T sign, l2;
  const bool decays, skips;

  LAYERLR_DEVICE Access(const Arrays& at, const D<T>& d, const Gradient& how)
      : at(at),
        d(d),
        how(how),
        sign(T(how.sign)),
        l2(T(how.l2)),
        decays(how.decays),
        skips(how.skip) {}

  LAYERLR_DEVICE static int block_of(int e) { return static_cast<unsigned>(e) / code_block; }

  LAYERLR_DEVICE T* s(int k) const { return reinterpret_cast<T*>(at.of[array_state + k]); }

  LAYERLR_DEVICE T decayed(T g, T weight) const { return decays ? g + weight * l2 : g; }

  /// Elements of an array of the parameter's type.
  template <class Whole>
  LAYERLR_DEVICE void load_typed(Use use, Whole whole, int array, int e, int n, T* x) const {
    with_type(P(), at.dtype, [&](auto p) {
      load(use, whole, reinterpret_cast<const decltype(p)*>(at.of[array]) + e, n, x);
    });
  }
  template <class Whole>
  LAYERLR_DEVICE void store_typed(Use use, Whole whole, int array, int e, int n, const T* x) const {
    with_type(P(), at.dtype, [&](auto p) {
      store(use, whole, reinterpret_cast<decltype(p)*>(at.of[array]) + e, n, x);
    });
  }

  template <class Whole>
  LAYERLR_DEVICE void load_gradient(Use use, Whole whole, int e, int n, T* x) const {
    load_typed(use, whole, array_g, e, n, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = x[i] * sign;
  }
  template <class Codes, class Whole>
  LAYERLR_DEVICE void load_states(Use use, Codes codes, Whole whole, int e, int n, int block,
                                  T (*x)[4]) const {
#pragma unroll
    for (int k = 0; k < states; ++k) {
      if constexpr (coded) {
        if (codes) {
          load_codes(use, codes, whole, e, n, block, k, x[k]);
          continue;
        }
        if (at.narrow) {
          load(use, whole, reinterpret_cast<const BFloat16*>(at.of[array_state + k]) + e, n, x[k]);
          continue;
        }
      }
      load(use, whole, s(k) + e, n, x[k]);
    }
  }
  /// Store the numbers x, and leave in it what a load will find.
  template <class Codes, class Whole>
  LAYERLR_DEVICE void store_states(Use use, Codes codes, Whole whole, int e, int n, int block,
                                   T (*x)[4]) const {
    if constexpr (coded && states > 0) {
      if (codes) return store_codes(use, codes, whole, e, n, block, x);
    }
#pragma unroll
    for (int k = 0; k < states; ++k) {
      if constexpr (coded) {
        if (at.narrow) {
          store(use, whole, reinterpret_cast<BFloat16*>(at.of[array_state + k]) + e, n, x[k]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            BFloat16 narrow;
            narrowed(x[k][i], narrow);
            x[k][i] = widened(narrow);
          }
          continue;
        }
      }
      store(use, whole, s(k) + e, n, x[k]);
    }
  }

  // -- states in codes of 8 bits: a block is what 16 threads have in hand -------------------------

  /// Of the warp, those that are at it together: all in a tile, else the half that has a block.
  LAYERLR_DEVICE static unsigned lanes(Known<true>) { return 0xffffffffu; }
  LAYERLR_DEVICE static unsigned lanes(bool) { return 0xffffu << (threadIdx.x & 16); }
  LAYERLR_DEVICE float* scale(int k, int block) const {
    return reinterpret_cast<float*>(at.of[array_scales + k]) + block;
  }
  /// How direction() reads them. Where it is not known that they are codes, they are numbers: the
  /// bits are the same.
  template <class Codes>
  using Read =
      std::conditional_t<std::is_same<Codes, Known<true>>::value, Held<D<T>, T>, States<T>>;

  template <class Codes>
  LAYERLR_DEVICE static T decoded(Codes, int k, T c, float scale) {
    const T held = decode(c, scale);
    const bool square = D<T>::nonnegative(k) && !std::is_same<Codes, Known<true>>::value;
    return square ? held * held : held;
  }
  template <class Codes, class Whole>
  LAYERLR_DEVICE void load_codes(Use use, Codes codes, Whole whole, int e, int n, int block, int k,
                                 T* x) const {
    const char* const from = at.of[array_state + k] + e;
    const T scale = device::read(this->scale(k, block));
    if (D<T>::nonnegative(k)) {
      load(use, whole, reinterpret_cast<const uint8_t*>(from), n, x);
    } else {
      load(use, whole, reinterpret_cast<const int8_t*>(from), n, x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = decoded(codes, k, x[i], scale);
  }
  template <class Codes, class Whole>
  LAYERLR_DEVICE void store_codes(Use use, Codes codes, Whole whole, int e, int n, int block,
                                  T (*x)[4]) const {
    const int thread = threadIdx.x % 16;  // of the block
    __syncwarp(lanes(whole));             // all of them have read the scales
#pragma unroll
    for (int k = 0; k < states; k += 2) {
      const int next = k + 1 < states ? k + 1 : k;
      BlockScale of[2];
      find_scales(lanes(whole), thread >= 8, k, next, x, of);
      if (thread == 0) {
        device::write(scale(k, block), of[0].scale);
        if (next != k) device::write(scale(next, block), of[1].scale);
      }
      encode(use, codes, whole, e, n, k, of[0], x[k]);
      if (next != k) encode(use, codes, whole, e, n, next, of[1], x[next]);
    }
  }
  template <class Codes, class Whole>
  LAYERLR_DEVICE void encode(Use use, Codes codes, Whole whole, int e, int n, int k,
                             const BlockScale& of, T* x) const {
    T c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[i] = D<T>::nonnegative(k) ? encode_unsigned(x[i], of.to_z) : encode_signed(x[i], of.to_z);
      x[i] = decoded(codes, k, c[i] - shift_of_codes, of.scale);
    }
    store(use, whole, reinterpret_cast<uint8_t*>(at.of[array_state + k] + e), n, c);
  }

  /// The scales of the blocks of two states, or of one that is named twice: half of the 16 threads
  /// find each. Of numbers without a sign the bits are in order, NaN last.
  LAYERLR_DEVICE static void find_scales(unsigned lanes, bool upper, int first, int second,
                                         const T (*x)[4], BlockScale* of) {
    const uint32_t one = largest_of(x[first]), two = largest_of(x[second]);
    uint32_t most = larger(upper ? two : one, __shfl_xor_sync(lanes, upper ? one : two, 8));
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
      most = larger(most, __shfl_xor_sync(lanes, most, distance));
    }
    const bool nonnegative = upper ? D<T>::nonnegative(second) : D<T>::nonnegative(first);
    const BlockScale mine(bit_cast<float>(most), nonnegative);
    of[0] = of[1] = mine;
    if (first == second) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      of[half].to_z = __shfl_sync(lanes, mine.to_z, 8 * half, 16);
      of[half].scale = __shfl_sync(lanes, mine.scale, 8 * half, 16);
    }
  }
  LAYERLR_DEVICE static uint32_t largest_of(const T* x) {
    return bit_cast<uint32_t>(device::larger_magnitude(device::larger_magnitude(x[0], x[1]),
                                                       device::larger_magnitude(x[2], x[3])));
  }

  // -- 16-bit weights and what lies beside them: layerlr/precision.py has the formulas ------------

  LAYERLR_DEVICE T nearest(T x) const {
    with_type(P(), at.dtype, [&](auto p) {
      narrowed(x, p);
      x = widened(p);
    });
    return x;
  }
  /// From four weights as they are stored to those that are held.
  template <class Whole>
  LAYERLR_DEVICE void hold_weights(Use use, Whole whole, int e, int n, T* x, T* stored) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) stored[i] = x[i];
    T beside[4];
    if (at.weights == Codec::master) {
      load(use, whole, reinterpret_cast<const T*>(at.of[array_aux]) + e, n, beside);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = nearest(beside[i]) == x[i] ? beside[i] : x[i];
    } else if (at.weights == Codec::kahan) {
      load_typed(use, whole, array_aux, e, n, beside);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = nearest(x[i] + beside[i] * T(0.5)) == x[i] ? x[i] + beside[i] : x[i];
      }
    }
  }
  /// x in place of `old`, whose nearest is `stored`.
  template <class Whole>
  LAYERLR_DEVICE void store_weights(Use use, Whole whole, int e, int n, const T* old,
                                    const T* stored, T* x) const {
    if constexpr (coded_weights) {
      if (at.weights == Codec::master) {
        store(use, whole, reinterpret_cast<T*>(at.of[array_aux]) + e, n, x);
      } else if (at.weights == Codec::kahan) {
        T rest[4], before[4];
        load_typed(use, whole, array_aux, e, n, before);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T left = x[i] - nearest(x[i]);
          const bool still = x[i] == old[i];  // a weight can be stored in two pairs
          rest[i] = still ? before[i] : left - left == 0 ? left : T(0);
          x[i] = still ? stored[i] : x[i];
        }
        store_typed(use, whole, array_aux, e, n, rest);
      } else if (at.weights == Codec::stochastic) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t bits = bit_cast<uint32_t>(x[i]), place = at.place + uint32_t(e + i);
          if (x[i] == x[i]) x[i] = bit_cast<T>(round_at_random(bits, at.key, place));
        }
      }
    }
    store_typed(use, whole, array_w, e, n, x);
  }
};

}  // namespace layerlr
