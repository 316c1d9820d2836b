#pragma once

#include "rules/base.h"

namespace layerlr {

/// b = -lr*r, r = min(|w|, clip)/|u| between two bounds, u with decoupled decay. You et al. 2020,
/// arXiv:1904.00962, algorithm 2.
struct Lamb : UpdateRule {
  static constexpr const char* name = "lamb";
  static constexpr bool plain_at_zero = true;
  double clip, least, most;

  LAYERLR_HD explicit Lamb(const double* h) : clip(h[0]), least(h[1]), most(h[2]) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double) const {
    const double norm = sqrt(s.ww), u = sqrt(s.uu), w = norm < clip ? norm : clip;
    double r = 1;
    if (w > 0 && u > 0) {
      r = w / u;
      if (r < least) r = least;
      if (r > most) r = most;
    }
    return step(u > 0 ? -(lr * r) : 0, r);
  }
};

/// LAMB whose u has no decay: the step is lr*|w| long.
struct Relative : Lamb {
  static constexpr const char* name = "relative";
  static constexpr bool decays_apart = true;

  LAYERLR_HD explicit Relative(const double* h) : Lamb(h) {}
};

}  // namespace layerlr
