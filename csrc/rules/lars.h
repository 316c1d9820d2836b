#pragma once

#include "core.h"

namespace layerlr {

/// f = trust*|w| / (|g| + decay*|w| + eps), g before L2 decay. You et al. 2017,
/// arXiv:1708.03888. h: trust, eps, clip (f = min(f/lr, 1)).
struct Lars {
  static constexpr const char* name = "lars";
  static constexpr bool update = false;
  static constexpr bool measures_ww = true;
  static constexpr bool raw_gradient = true;
  static constexpr bool latches = false;
  LAYERLR_HD static LayerScale scale(const LayerStats& s, double lr, double decay, double,
                                     const double* h) {
    const double w = sqrt(s.ww), g = sqrt(s.gg);
    double f = 1;
    if (w > 0 && g > 0) {
      f = h[0] * w / (g + decay * w + h[1]);
      if (h[2] != 0) f = f < lr ? f / lr : 1;
    }
    return {f, 1, 0, f};
  }
};

}  // namespace layerlr
