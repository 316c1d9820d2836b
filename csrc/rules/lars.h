#pragma once

#include "rules/base.h"

namespace layerlr {

/// f = trust*|w| / (|g| + decay*|w| + eps), g before L2 decay; trust_clip: f = min(f/lr, 1). You et
/// al. 2017, arXiv:1708.03888.
struct Lars : GradientRule {
  static constexpr const char* name = "lars";
  static constexpr bool measures_ww = true;
  static constexpr bool raw_gradient = true;
  static constexpr bool plain_at_zero = true;
  double trust, eps;
  bool trust_clip;

  LAYERLR_HD explicit Lars(const double* h) : trust(h[0]), eps(h[1]), trust_clip(h[2] != 0) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double decay, double) const {
    const double w = sqrt(s.ww), g = sqrt(s.gg);
    if (!(w > 0 && g > 0)) return factor(1);
    const double f = trust * w / (g + decay * w + eps);
    if (trust_clip) return factor(f < lr ? f / lr : 1);
    return factor(f);
  }
};

}  // namespace layerlr
