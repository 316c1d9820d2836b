// Adagrad.
#pragma once

#include "core.h"

namespace layerlr {

/// s <- s + g^2, u = g / (sqrt(s) + eps). Duchi et al. 2011, diagonal form.
template <class T>
struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr int states = 1;
  static constexpr bool first_order = false;
  static constexpr bool needs_grad = true;
  T eps;

  LAYERLR_HD Adagrad(const double* h, double) : eps(T(h[0])) {}
  LAYERLR_HD static double rate(const double* h, double t) { return 1 / (1 + (t - 1) * h[1]); }
  LAYERLR_HD static constexpr bool nonnegative(int) { return true; }

  template <class V>
  LAYERLR_HD void advance(V g, V* s) const {
    s[0] = s[0] + g * g;
  }
  template <class V, class S>
  LAYERLR_HD V direction(V g, S s) const {
    return g / (s.root_of(0) + eps);
  }
};

}  // namespace layerlr
