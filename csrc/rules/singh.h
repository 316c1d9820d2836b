#pragma once

#include "rules/base.h"

namespace layerlr {

/// f = 1 + log(1 + 1/|g|), 0 for a zero gradient. Singh et al. 2015, arXiv:1510.04609, eq. 9.
struct Singh : GradientRule {
  static constexpr const char* name = "singh";

  LAYERLR_HD explicit Singh(const double*) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double, double, double) const {
    const double n = sqrt(s.gg);
    return factor(n > 0 ? 1 + log((1 + n) / n) : 0);
  }
};

}  // namespace layerlr
