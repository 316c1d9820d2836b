#pragma once

#include "core.h"

namespace layerlr {

/// f = 1, or b = -lr: the step of the direction itself, for parameters outside every layer, in the
/// order that their group's rule has.
struct Plain {
  static constexpr const char* name = "plain";
  static constexpr bool update = false;        // scales the gradient, not the step
  static constexpr bool measures_ww = false;   // the first pass reads the weights
  static constexpr bool raw_gradient = false;  // gg before L2 decay is added
  static constexpr bool latches = false;       // the norm of the layer's first step is kept
  LAYERLR_HD static LayerScale scale(const LayerStats&, double lr, double, double, const double*) {
    return {1, 1, -lr, 1};
  }
};

}  // namespace layerlr
