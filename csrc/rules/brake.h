#pragma once

#include "rules/base.h"

namespace layerlr {

/// The step w - lr*u; where it lengthens w, to |w| plus a part of the growth.
struct Brake : UpdateRule {
  static constexpr const char* name = "brake";
  double outward;

  LAYERLR_HD explicit Brake(const double* h) : outward(h[0]) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double) const {
    const double norm = sqrt(s.ww);
    const double square = s.ww - 2 * lr * s.wu + lr * lr * s.uu;
    const double moved = square > 0 ? sqrt(square) : 0;
    if (!(moved > norm)) return step(-lr, 1);
    const double k = (norm + outward * (moved - norm)) / moved;
    return {1, k, -(k * lr), k};
  }
};

}  // namespace layerlr
