#pragma once

#include "core.h"

namespace layerlr {

/// f = 1 + log(1 + 1/|g|), 0 for a zero gradient. Singh et al. 2015, arXiv:1510.04609, eq. 9.
struct Singh {
  static constexpr const char* name = "singh";
  static constexpr bool update = false;
  static constexpr bool measures_ww = false;
  static constexpr bool raw_gradient = false;
  static constexpr bool latches = false;
  LAYERLR_HD static LayerScale scale(const LayerStats& s, double, double, double, const double*) {
    const double n = sqrt(s.gg);
    const double f = n > 0 ? 1 + log((1 + n) / n) : 0;
    return {f, 1, 0, f};
  }
};

}  // namespace layerlr
