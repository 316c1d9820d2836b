#pragma once

#include "rules/base.h"

namespace layerlr {

/// b = -lr*rate, the rate being the layer's memory: somebody else sets it.
struct Rated : UpdateRule {
  static constexpr const char* name = "rated";

  LAYERLR_HD explicit Rated(const double*) {}
  LAYERLR_HD LayerScale scale(const LayerStats&, double lr, double, double rate) const {
    return step(-(lr * rate), rate);
  }
};

}  // namespace layerlr
