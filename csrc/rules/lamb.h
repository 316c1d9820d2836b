#pragma once

#include "core.h"

namespace layerlr {

/// b = -lr*r, r = min(|w|, clip)/|u|, u with decoupled decay. You et al. 2020, arXiv:1904.00962,
/// algorithm 2. h: clip, limit r to 1.
struct Lamb {
  static constexpr const char* name = "lamb";
  static constexpr bool update = true;
  static constexpr bool measures_ww = true;
  static constexpr bool raw_gradient = false;
  static constexpr bool latches = false;
  LAYERLR_HD static LayerScale scale(const LayerStats& s, double lr, double, double,
                                     const double* h) {
    const double norm = sqrt(s.ww), u = sqrt(s.uu), w = norm < h[0] ? norm : h[0];
    double r = 1;
    if (w > 0 && u > 0) {
      r = w / u;
      if (h[1] != 0 && r > 1) r = 1;
    }
    return {1, 1, u > 0 ? -(lr * r) : 0, r};
  }
};

}  // namespace layerlr
