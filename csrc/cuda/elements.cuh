// The two passes over the elements of an item.
#pragma once

#include "cuda/sums.cuh"
#include "cuda/vectors.cuh"

namespace layerlr {

/// Where the arrays of an item begin, how many elements it has, and how they are stored.
struct Arrays {
  char* of[arrays];
  int count;     // of elements, where there are codes as if blocks were whole
  int block;     // elements that share a scale
  bool aligned;  // every array begins at a vector
  bool narrow;   // states are bfloat16
  Codec weights;
  uint32_t key, place;  // of stochastic rounding: the step's, the first element's
};

/// What a step does to every gradient.
struct Gradient {
  double sign, l2;
  bool raw;      // the rule measures it before L2 decay
  bool weights;  // the first pass of a gradient rule reads them
  bool skip;     // an element with a bad gradient keeps its state
};

/// Elements of direction D and parameter type P. `coded`: weights and states may have codecs; if
/// `codes`, those of the states are codes of 8 bits. `straight`: full tiles of aligned arrays have
/// a loop of their own, without questions.
template <template <class> class D, class P, bool coded, bool codes, bool straight>
struct Elements {
  static constexpr bool coded_weights = coded && sizeof(P) == 2;
  using T = typename Wide<P>::type;
  static constexpr int states = D<T>::states;
  /// Vectors of four that a worker has in hand, as registers allow; between them lie those of the
  /// other workers.
  static constexpr int in_hand = sizeof(T) == 8 || codes || states > (coded ? 1 : 2) ? 1 : 2;
  static constexpr int stride = 4 * workers;

  const Arrays& at;
  const D<T>& d;
  const Gradient& how;
  const T sign, l2;
  const bool decays, skips;

  LAYERLR_DEVICE Elements(const Arrays& at, const D<T>& d, const Gradient& how)
      : at(at),
        d(d),
        how(how),
        sign(T(how.sign)),
        l2(T(how.l2)),
        decays(how.l2 != 0),
        skips(how.skip) {}

  /// Call body(whole, vectors, e, n, block) for this worker's vectors, `vectors` of them from
  /// element e on, each of n elements.
  template <class Body>
  LAYERLR_DEVICE void vectors(Body body) const {
    const int count = at.count, first = static_cast<int>(threadIdx.x) * 4;
    constexpr std::integral_constant<int, 1> single;
    if (codes && at.block != code_block) {  // 16 threads have a block that does not fill them
#pragma unroll 1
      for (int e = first; e < count; e += stride) {
        const int block = block_of(e), within = e - block * code_block, rest = at.block - within;
        const int n = rest < 4 ? rest : 4;
        body(at.aligned && n == 4, single, block * at.block + within, n, block);
      }
      return;
    }
    int e = first;
    if (straight && at.aligned) {
      constexpr int tile = in_hand * stride;
#pragma unroll 1
      for (; e + tile - first <= count; e += tile) {
        body(Always(), std::integral_constant<int, in_hand>(), e, 4, block_of(e));
      }
    }
#pragma unroll 1
    for (; e < count; e += stride) {
      const int n = count - e < 4 ? count - e : 4;
      body(at.aligned && n == 4, single, e, n, block_of(e));
    }
  }

  LAYERLR_DEVICE static int block_of(int e) { return static_cast<unsigned>(e) / code_block; }

  LAYERLR_DEVICE P* w() const { return reinterpret_cast<P*>(at.of[array_w]); }
  LAYERLR_DEVICE const P* g() const { return reinterpret_cast<const P*>(at.of[array_g]); }
  LAYERLR_DEVICE T* s(int k) const { return reinterpret_cast<T*>(at.of[array_state + k]); }

  LAYERLR_DEVICE T decayed(T g, T weight) const { return decays ? g + weight * l2 : g; }

  template <Use use, class Whole>
  LAYERLR_DEVICE void load_gradient(Whole whole, int e, int n, T* x) const {
    load<use>(whole, g() + e, n, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = x[i] * sign;
  }
  template <Use use, class Whole>
  LAYERLR_DEVICE void load_states(Whole whole, int e, int n, int block, T (*x)[4]) const {
#pragma unroll
    for (int k = 0; k < states; ++k) {
      if constexpr (codes) {
        load_codes<use>(whole, e, n, block, k, x[k]);
      } else if (coded && at.narrow) {
        load<use>(whole, reinterpret_cast<const BFloat16*>(at.of[array_state + k]) + e, n, x[k]);
      } else {
        load<use>(whole, s(k) + e, n, x[k]);
      }
    }
  }
  /// Store the states, and leave in x what a load will find.
  template <Use use, class Whole>
  LAYERLR_DEVICE void store_states(Whole whole, int e, int n, int block, T (*x)[4]) const {
#pragma unroll
    for (int k = 0; k < states; ++k) {
      if constexpr (codes) {
        store_codes<use>(whole, e, n, block, k, x[k]);
      } else if (coded && at.narrow) {
        store<use>(whole, reinterpret_cast<BFloat16*>(at.of[array_state + k]) + e, n, x[k]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          BFloat16 narrow;
          narrowed(x[k][i], narrow);
          x[k][i] = widened(narrow);
        }
      } else {
        store<use>(whole, s(k) + e, n, x[k]);
      }
    }
  }

  // -- states in codes of 8 bits: a block is what 16 threads have in hand -------------------------

  LAYERLR_DEVICE float* scale(int k, int block) const {
    return reinterpret_cast<float*>(at.of[array_scales + k]) + block;
  }
  template <Use use, class Whole>
  LAYERLR_DEVICE void load_codes(Whole whole, int e, int n, int block, int k, T* x) const {
    const char* const from = at.of[array_state + k] + e;
    const T scale = device::read(this->scale(k, block));
    if (D<T>::nonnegative(k)) {
      load<use>(whole, reinterpret_cast<const uint8_t*>(from), n, x);
    } else {
      load<use>(whole, reinterpret_cast<const int8_t*>(from), n, x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = D<T>::nonnegative(k) ? decode_unsigned(x[i], scale) : decode_signed(x[i], scale);
    }
  }
  template <Use use, class Whole>
  LAYERLR_DEVICE void store_codes(Whole whole, int e, int n, int block, int k, T* x) const {
    const float z = D<T>::nonnegative(k) ? largest_unsigned : largest_signed;
    const BlockScale of(largest_of_block(x), z);
    T c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[i] = D<T>::nonnegative(k) ? encode_unsigned(x[i], of.to_z) : encode_signed(x[i], of.to_z);
      x[i] = D<T>::nonnegative(k) ? decode_unsigned(c[i], of.scale) : decode_signed(c[i], of.scale);
    }
    store<use>(whole, reinterpret_cast<uint8_t*>(at.of[array_state + k] + e), n, c);
    if (threadIdx.x % 16 == 0) device::write(scale(k, block), of.scale);
  }
  /// Of numbers without a sign the bits are in order, NaN last.
  LAYERLR_DEVICE static float largest_of_block(const T* x) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(magnitude(x[i]));
      most = bits > most ? bits : most;
    }
    const unsigned lanes = 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      const uint32_t other = __shfl_xor_sync(lanes, most, distance);
      most = other > most ? other : most;
    }
    return bit_cast<float>(most);
  }

  // -- 16-bit weights and what lies beside them: layerlr/precision.py has the formulas ------------

  LAYERLR_DEVICE static T nearest(T x) {
    P p;
    narrowed(x, p);
    return widened(p);
  }
  /// Four weights, and the nearest 16-bit numbers to them as they are stored.
  template <Use use, class Whole>
  LAYERLR_DEVICE void load_weights(Whole whole, int e, int n, T* x, T* stored) const {
    load<use>(whole, w() + e, n, stored);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = stored[i];
    if constexpr (coded_weights) {
      T beside[4];
      if (at.weights == Codec::master) {
        load<use>(whole, reinterpret_cast<const T*>(at.of[array_aux]) + e, n, beside);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = nearest(beside[i]) == x[i] ? beside[i] : x[i];
      } else if (at.weights == Codec::kahan) {
        load<use>(whole, reinterpret_cast<const P*>(at.of[array_aux]) + e, n, beside);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = nearest(x[i] + beside[i] * T(0.5)) == x[i] ? x[i] + beside[i] : x[i];
        }
      }
    }
  }
  /// x in place of `old`, whose nearest is `stored`.
  template <Use use, class Whole>
  LAYERLR_DEVICE void store_weights(Whole whole, int e, int n, const T* old, const T* stored,
                                    T* x) const {
    if constexpr (coded_weights) {
      if (at.weights == Codec::master) {
        store<use>(whole, reinterpret_cast<T*>(at.of[array_aux]) + e, n, x);
      } else if (at.weights == Codec::kahan) {
        T rest[4], before[4];
        load<use>(whole, reinterpret_cast<const P*>(at.of[array_aux]) + e, n, before);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T left = x[i] - nearest(x[i]);
          const bool still = x[i] == old[i];  // a weight can be stored in two pairs
          rest[i] = still ? before[i] : left - left == 0 ? left : T(0);
          x[i] = still ? stored[i] : x[i];
        }
        store<use>(whole, reinterpret_cast<P*>(at.of[array_aux]) + e, n, rest);
      } else if (at.weights == Codec::stochastic) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t bits = bit_cast<uint32_t>(x[i]), place = at.place + uint32_t(e + i);
          if (x[i] == x[i]) x[i] = bit_cast<T>(round_at_random(bits, at.key, place));
        }
      }
    }
    store<use>(whole, w() + e, n, x);
  }

  // -- the passes --

  /// Gradient rules, first pass.
  LAYERLR_DEVICE LayerStats measure() const {
    LayerStats sums;
    const bool weights = how.weights, raw = how.raw;
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4] = {}, g[many][4], stored[4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        if (weights) load_weights<again>(whole, e + v * stride, n, w[v], stored);
        load_gradient<again>(whole, e + v * stride, n, g[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const T x = raw ? g[v][i] : decayed(g[v][i], w[v][i]);
          if (weights) add(sums.ww, w[v][i], w[v][i]);
          add(sums.gg, x, x);
        }
      }
    });
    return sums;
  }

  /// Update rules, first pass: the state moves on.
  LAYERLR_DEVICE LayerStats advance() const {
    LayerStats sums;
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4], g[many][4], s[many][states + 1][4], stored[4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        load_weights<again>(whole, e + v * stride, n, w[v], stored);
        load_gradient<D<T>::needs_grad ? again : last>(whole, e + v * stride, n, g[v]);
        load_states<again>(whole, e + v * stride, n, block, s[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool still = skips && !is_finite(g[v][i]);
          g[v][i] = decayed(g[v][i], w[v][i]);
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          d.advance(g[v][i], now);
#pragma unroll
          for (int k = 0; k < states; ++k) s[v][k][i] = still ? s[v][k][i] : now[k];
        }
        store_states<again>(whole, e + v * stride, n, block, s[v]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          const T u = i < n ? d.direction(g[v][i], now) : T(0);
          add(sums.ww, w[v][i], w[v][i]);
          add(sums.gg, g[v][i], g[v][i]);
          add(sums.uu, u, u);
          add(sums.wu, w[v][i], u);
        }
      }
    });
    return sums;
  }

  /// Update rules, second pass: w <- a*w + b*u, u formed again from the state.
  LAYERLR_DEVICE void apply(T a, T b) const {
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4], g[many][4] = {}, s[many][states + 1][4], stored[many][4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        load_weights<last>(whole, e + v * stride, n, w[v], stored[v]);
        if (D<T>::needs_grad) load_gradient<last>(whole, e + v * stride, n, g[v]);
        load_states<last>(whole, e + v * stride, n, block, s[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
        T moved[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          const T u = d.direction(decayed(g[v][i], w[v][i]), now);
          moved[i] = add_step(w[v][i] * a, u * b);
        }
        store_weights<last>(whole, e + v * stride, n, w[v], stored[v], moved);
      }
    });
  }

  /// Gradient rules and no rule: advance with grad*g, apply. `tells`: the sums of what the rule did
  /// not see.
  template <bool tells>
  LAYERLR_DEVICE LayerStats advance_apply(T grad, T a, T b) const {
    constexpr Use use = tells ? last : once;
    LayerStats sums;
    vectors([&](auto whole, auto in_hand, int e, int n, int block) {
      constexpr int many = decltype(in_hand)::value;
      T w[many][4], g[many][4], s[many][states + 1][4], stored[many][4];
#pragma unroll
      for (int v = 0; v < many; ++v) {
        load_weights<use>(whole, e + v * stride, n, w[v], stored[v]);
        load_gradient<use>(whole, e + v * stride, n, g[v]);
        load_states<use>(whole, e + v * stride, n, block, s[v]);
      }
#pragma unroll
      for (int v = 0; v < many; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          g[v][i] = decayed(g[v][i], w[v][i]);
          if (tells) g[v][i] = g[v][i] * grad;  // 1 where there is no rule
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          d.advance(g[v][i], now);
#pragma unroll
          for (int k = 0; k < states; ++k) s[v][k][i] = now[k];
        }
        store_states<use>(whole, e + v * stride, n, block, s[v]);
        T moved[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T now[states + 1];
#pragma unroll
          for (int k = 0; k < states; ++k) now[k] = s[v][k][i];
          const T u = i < n ? d.direction(g[v][i], now) : T(0);
          if (tells) {
            add(sums.ww, w[v][i], w[v][i]);
            add(sums.uu, u, u);
            add(sums.wu, w[v][i], u);
          }
          moved[i] = add_step(w[v][i] * a, u * b);
        }
        store_weights<use>(whole, e + v * stride, n, w[v], stored[v], moved);
      }
    });
    return sums;
  }
};

}  // namespace layerlr
