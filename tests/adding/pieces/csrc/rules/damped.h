#pragma once

#include "rules/base.h"

namespace layerlr {

/// b = -lr*f, f = |w| / (|w| + damping*|u|); 1 where u is zero.
struct Damped : UpdateRule {
  static constexpr const char* name = "damped";
  double damping;

  LAYERLR_HD explicit Damped(const double* h) : damping(h[0]) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double) const {
    const double w = sqrt(s.ww), u = sqrt(s.uu);
    const double f = u > 0 ? w / (w + damping * u) : 1;
    return step(-lr * f, f);
  }
};

}  // namespace layerlr
