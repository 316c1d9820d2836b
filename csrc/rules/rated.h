#pragma once

#include "core.h"

namespace layerlr {

/// b = -lr*rate, the rate being the number that the layer keeps: somebody else sets it.
struct Rated {
  static constexpr const char* name = "rated";
  static constexpr bool update = true;
  static constexpr bool measures_ww = true;
  static constexpr bool raw_gradient = false;
  static constexpr bool latches = false;
  LAYERLR_HD static LayerScale scale(const LayerStats&, double lr, double, double rate,
                                     const double*) {
    return {1, 1, -(lr * rate), rate};
  }
};

}  // namespace layerlr
