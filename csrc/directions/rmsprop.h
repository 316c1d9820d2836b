// RMSprop: plain, centered, with momentum, or both.
#pragma once

#include "core.h"

namespace layerlr {

/// v <- a*v + (1-a)*g^2, u = g / (sqrt(v) + eps); centered: v - r^2 under the root, with
/// r <- a*r + (1-a)*g; momentum: m <- mu*m + u, u = m. Hinton 2012, Graves 2013.
template <class T, bool centered, bool momentum>
struct RmspropBase {
  static constexpr int states = 1 + centered + momentum;
  static constexpr bool first_order = false;
  static constexpr bool needs_grad = !momentum;
  T alpha, one_minus_alpha, eps, mu;

  LAYERLR_HD RmspropBase(const double* h, double)
      : alpha(T(h[0])), one_minus_alpha(T(1 - h[0])), eps(T(h[1])), mu(T(h[2])) {}
  LAYERLR_HD static double rate(const double*, double) { return 1; }
  LAYERLR_HD static constexpr bool nonnegative(int k) { return k == 0; }

  template <class V, class S>
  LAYERLR_HD V normalised(V g, S s) const {
    if constexpr (centered) return g / (root(s[0] - s[1] * s[1]) + eps);
    return g / (s.root_of(0) + eps);
  }
  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    s[0] = s[0] * alpha + (g * g) * one_minus_alpha;
    if constexpr (centered) s[1] = s[1] * alpha + g * one_minus_alpha;
    if constexpr (momentum) s[states - 1] = s[states - 1] * mu + normalised(g, States<V>{s});
  }
  template <class V, class S>
  LAYERLR_HD V direction(V g, S s) const {
    if constexpr (momentum) return s[states - 1];
    return normalised(g, s);
  }
};

template <class T>
struct Rmsprop : RmspropBase<T, false, false> {
  static constexpr const char* name = "rmsprop";
  using RmspropBase<T, false, false>::RmspropBase;
};

template <class T>
struct RmspropCentered : RmspropBase<T, true, false> {
  static constexpr const char* name = "rmsprop_centered";
  using RmspropBase<T, true, false>::RmspropBase;
};

// What is left of two rounded means may be below zero.
template <>
inline constexpr bool takes_codes<RmspropCentered> = false;

template <class T>
struct RmspropMomentum : RmspropBase<T, false, true> {
  static constexpr const char* name = "rmsprop_momentum";
  using RmspropBase<T, false, true>::RmspropBase;
};

template <class T>
struct RmspropCenteredMomentum : RmspropBase<T, true, true> {
  static constexpr const char* name = "rmsprop_centered_momentum";
  using RmspropBase<T, true, true>::RmspropBase;
};

template <>
inline constexpr bool takes_codes<RmspropCenteredMomentum> = false;

}  // namespace layerlr
