#pragma once

#include "rules/base.h"

namespace layerlr {

/// f = 1, or b = -lr: the step of the direction itself, for parameters outside every layer, in the
/// order that their group's rule has.
struct Plain : GradientRule {
  static constexpr const char* name = "plain";

  LAYERLR_HD explicit Plain(const double*) {}
  LAYERLR_HD LayerScale scale(const LayerStats&, double lr, double, double) const {
    return {1, 1, -lr, 1};
  }
};

}  // namespace layerlr
