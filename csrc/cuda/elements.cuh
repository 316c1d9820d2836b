// What is done to the elements of a tile that lies in shared memory.
#pragma once

#include "cuda/sums.cuh"
#include "cuda/tile.cuh"

namespace layerlr {

/// y where the gradient is finite (its difference to itself is 0), x elsewhere.
template <class T>
LAYERLR_DEVICE T where_finite(T g, T y, T x) {
  return g - g == 0 ? y : x;
}
/// moved + step; where the step is zero, moved to the bit, the sign of a zero too.
template <class T>
LAYERLR_DEVICE T add_step(T moved, T step) {
  return step == 0 ? moved : moved + step;
}

/// Where a tile's arrays lie in shared memory, and how many elements it has.
struct Arrays {
  char* w;
  char* g;
  char* s[max_states];
  char* u;
  int count;
  Held held;
  char* extra = nullptr;    // what 16-bit weights have beside them, in global memory
  uint32_t key = 0, place;  // of stochastic rounding: the step's, the first element's
};

/// What a step does to every gradient.
struct Gradient {
  double sign, l2;
  bool raw;   // the rule measures it before L2 decay
  bool ww;    // the rule measures the weights
  bool skip;  // an element with a bad gradient keeps its state
};

/// The tile of direction D over parameters of type P.
template <template <class> class D, class P>
struct Tile {
  using T = typename Wide<P>::type;
  static constexpr int states = D<T>::states;

  const Arrays& at;
  const D<T>& d;
  const Gradient& how;
  T sign, l2;
  bool decays;

  LAYERLR_DEVICE Tile(const Arrays& at, const D<T>& d, const Gradient& how)
      : at(at), d(d), how(how), sign(T(how.sign)), l2(T(how.l2)), decays(how.l2 != 0) {}

  LAYERLR_DEVICE P* w() const { return reinterpret_cast<P*>(at.w); }
  LAYERLR_DEVICE T* u() const { return reinterpret_cast<T*>(at.u); }
  LAYERLR_DEVICE T* s(int k) const { return reinterpret_cast<T*>(at.s[k]); }
  LAYERLR_DEVICE static T nearest(T x) {
    P p;
    narrowed(x, p);
    return widened(p);
  }
  /// The weight of element e, p being its nearest.
  LAYERLR_DEVICE T weight(T p, int e) const {
    if (at.held == Held::master) {
      const T x = device::read(reinterpret_cast<const T*>(at.extra) + e);
      return nearest(x) == p ? x : p;
    }
    if (at.held == Held::kahan) {
      const T rest = widened(device::read(reinterpret_cast<const P*>(at.extra) + e));
      return nearest(p + rest * T(0.5)) == p ? p + rest : p;
    }
    return p;
  }
  /// Hold x in place of `old`, but for what is returned: to be stored as the nearest.
  LAYERLR_DEVICE T hold(T p, T old, T x, int e) const {
    if (at.held == Held::master) device::write(reinterpret_cast<T*>(at.extra) + e, x);
    if (at.held == Held::kahan) {
      if (x == old) return p;  // a weight can be held by two pairs
      const T rest = x - nearest(x);
      P c;
      narrowed(rest - rest == 0 ? rest : T(0), c);
      device::write(reinterpret_cast<P*>(at.extra) + e, c);
    }
    if (at.held == Held::stochastic && x == x) {
      const uint32_t bits = bit_cast<uint32_t>(x);
      return bit_cast<T>(round_at_random(bits, at.key, at.place + static_cast<uint32_t>(e)));
    }
    return x;
  }
  template <class Whole>
  LAYERLR_DEVICE void load_weights(Whole whole, int e, int n, T* w) const {
    load(whole, this->w() + e, n, w);
    if constexpr (sizeof(P) == 2) {
      if (at.held != Held::nearest) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = i < n ? weight(w[i], e + i) : T(0);
      }
    }
  }
  template <class Whole>
  LAYERLR_DEVICE void store_weights(Whole whole, int e, int n, const T* old, T* x) const {
    if constexpr (sizeof(P) == 2) {
      if (at.held != Held::nearest) {
        T p[4];
        load(whole, this->w() + e, n, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = i < n ? hold(p[i], old[i], x[i], e + i) : T(0);
      }
    }
    store(whole, this->w() + e, n, x);
  }
  template <class Whole>
  LAYERLR_DEVICE void load_gradient(Whole whole, int e, int n, T* g) const {
    load(whole, reinterpret_cast<const P*>(at.g) + e, n, g);
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] = g[i] * sign;
  }
  LAYERLR_DEVICE bool aligned() const {
    int off = shift(at.w) | shift(at.g);
    for (int k = 0; k < states; ++k) off |= shift(at.s[k]);
    return off == 0;
  }
  LAYERLR_DEVICE T decayed(T g, T weight) const { return decays ? g + weight * l2 : g; }
  /// The state of element i, out of the four that were loaded, and back.
  LAYERLR_DEVICE void take(const T (*four)[4], int i, T* x) const {
    for (int k = 0; k < states; ++k) x[k] = four[k][i];
  }
  LAYERLR_DEVICE void give(T (*four)[4], int i, const T* x) const {
    for (int k = 0; k < states; ++k) four[k][i] = x[k];
  }

  /// Gradient rules: gg, and ww where it is asked for.
  LAYERLR_DEVICE LayerStats measure() const {
    LayerStats sums;
    const bool reads_w = how.ww || (decays && !how.raw);
    vectors<T>(at.count, aligned(), [&](auto whole, int e, int n) {
      T w[4] = {}, g[4];
      load_gradient(whole, e, n, g);
      if (reads_w) load_weights(whole, e, n, w);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T x = how.raw ? g[i] : decayed(g[i], w[i]);
        add(sums.ww, w[i], w[i]);
        add(sums.gg, x, x);
      }
    });
    return sums;
  }

  /// Update rules: advance the state, sum all four, leave u.
  LAYERLR_DEVICE LayerStats advance() const {
    LayerStats sums;
    vectors<T>(at.count, aligned(), [&](auto whole, int e, int n) {
      T w[4], g[4], u[4], four[states + 1][4];
      load_weights(whole, e, n, w);
      load_gradient(whole, e, n, g);
      for (int k = 0; k < states; ++k) load(whole, s(k) + e, n, four[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T raw = g[i], used = decayed(raw, w[i]);
        T old[states + 1], now[states + 1];
        take(four, i, old);
        for (int k = 0; k < states; ++k) now[k] = old[k];
        d.advance(used, now);
        if (how.skip) {
          for (int k = 0; k < states; ++k) now[k] = where_finite(raw, now[k], old[k]);
        }
        give(four, i, now);
        u[i] = i < n ? d.direction(used, now) : T(0);
        add(sums.ww, w[i], w[i]);
        add(sums.gg, used, used);
        add(sums.uu, u[i], u[i]);
        add(sums.wu, w[i], u[i]);
      }
      for (int k = 0; k < states; ++k) store(whole, s(k) + e, n, four[k]);
      store(whole, this->u() + e, n, u);
    });
    return sums;
  }

  /// Update rules, a tile read again: u from the state as it is.
  LAYERLR_DEVICE void direction() const {
    vectors<T>(at.count, aligned(), [&](auto whole, int e, int n) {
      T w[4] = {}, g[4] = {}, u[4], four[states + 1][4];
      if (D<T>::needs_grad) {
        load_gradient(whole, e, n, g);
        if (decays) load_weights(whole, e, n, w);
      }
      for (int k = 0; k < states; ++k) load(whole, s(k) + e, n, four[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T now[states + 1];
        take(four, i, now);
        u[i] = d.direction(decayed(g[i], w[i]), now);
      }
      store(whole, this->u() + e, n, u);
    });
  }

  /// Update rules: w <- a*w + b*u.
  LAYERLR_DEVICE void apply(const LayerScale& scale) const {
    const T a = T(scale.a), b = T(scale.b);
    vectors<T>(at.count, aligned(), [&](auto whole, int e, int n) {
      T w[4], u[4], moved[4];
      load_weights(whole, e, n, w);
      load(whole, this->u() + e, n, u);
#pragma unroll
      for (int i = 0; i < 4; ++i) moved[i] = add_step(w[i] * a, u[i] * b);
      store_weights(whole, e, n, w, moved);
    });
  }

  /// Gradient rules: advance with grad*g, apply; sums of what the rule did not see.
  LAYERLR_DEVICE LayerStats advance_apply(const LayerScale& scale) const {
    const T grad = T(scale.grad), a = T(scale.a), b = T(scale.b);
    LayerStats sums;
    vectors<T>(at.count, aligned(), [&](auto whole, int e, int n) {
      T w[4], g[4], moved[4], four[states + 1][4];
      load_weights(whole, e, n, w);
      load_gradient(whole, e, n, g);
      for (int k = 0; k < states; ++k) load(whole, s(k) + e, n, four[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T used = decayed(g[i], w[i]) * grad;
        T now[states + 1];
        take(four, i, now);
        d.advance(used, now);
        give(four, i, now);
        const T u = i < n ? d.direction(used, now) : T(0);
        add(sums.ww, w[i], w[i]);
        add(sums.uu, u, u);
        add(sums.wu, w[i], u);
        moved[i] = add_step(w[i] * a, u * b);
      }
      for (int k = 0; k < states; ++k) store(whole, s(k) + e, n, four[k]);
      store_weights(whole, e, n, w, moved);
    });
    return sums;
  }
};

}  // namespace layerlr
