// A sign without a jump.
#pragma once

#include "core.h"

namespace layerlr {

/// m <- b*m + (1-b)*g, u = m / (|m| + eps).
template <class T>
struct SoftSign {
  static constexpr const char* name = "soft_sign";
  static constexpr int states = 1;
  static constexpr bool first_order = false;
  static constexpr bool needs_grad = false;
  T beta, one_minus_beta, eps;

  /// h: beta, eps.
  LAYERLR_HD SoftSign(const double* h, double)
      : beta(T(h[0])), one_minus_beta(T(1 - h[0])), eps(T(h[1])) {}
  LAYERLR_HD static double rate(const double*, double) { return 1; }
  LAYERLR_HD static constexpr bool nonnegative(int) { return false; }

  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    s[0] = s[0] * beta + g * one_minus_beta;
  }
  template <class V, class S>
  LAYERLR_HD V direction(V, S s) const {
    return s[0] / (root(s[0] * s[0]) + eps);
  }
};

}  // namespace layerlr
