// Lion.
#pragma once

#include "core.h"

namespace layerlr {

/// m <- b2*m + (1-b2)*g, u = sign(alpha*m + (1-alpha)*g) with the new m and alpha = b1/b2: the sign
/// of Lion's b1*m_old + (1-b1)*g. Chen et al. 2023, Algorithm 2.
template <class T>
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr int states = 1;
  static constexpr bool first_order = false;
  static constexpr bool needs_grad = true;
  T beta2, one_minus_beta2, alpha, one_minus_alpha;

  /// h: beta1, beta2.
  LAYERLR_HD Lion(const double* h, double)
      : beta2(T(h[1])),
        one_minus_beta2(T(1 - h[1])),
        alpha(T(h[0] / h[1])),
        one_minus_alpha(T(1 - h[0] / h[1])) {}
  LAYERLR_HD static double rate(const double*, double) { return 1; }
  LAYERLR_HD static constexpr bool nonnegative(int) { return false; }

  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    s[0] = s[0] * beta2 + g * one_minus_beta2;
  }
  template <class V, class S>
  LAYERLR_HD V direction(V g, S s) const {
    return sign(s[0] * alpha + g * one_minus_alpha);
  }
};

}  // namespace layerlr
