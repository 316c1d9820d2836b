#pragma once

#include "rules/base.h"

namespace layerlr {

/// w <- R*(w - s*u)/|w - s*u|, s = lr*R/|u|: a step lr*R long, and back to the sphere. R is a
/// number, the memory, or (0: none) the present norm. arXiv:2606.16899.
struct Hyperball : UpdateRule {
  static constexpr const char* name = "hyperball";
  static constexpr bool latches = true;
  static constexpr bool plain_at_zero = true;
  double radius;
  bool current;

  LAYERLR_HD explicit Hyperball(const double* h) : radius(h[0]), current(h[1] != 0) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double memory) const {
    const double norm = sqrt(s.ww), u = sqrt(s.uu);
    const double r = radius > 0 ? radius : memory > 0 && !current ? memory : norm;
    if (!(r > 0)) return step(-lr, 1);
    if (!(u > 0)) return step(0, 0);
    const double length = lr * r / u;
    const double square = s.ww - 2 * length * s.wu + length * length * s.uu;
    if (!(lr > 0 && square > 0)) return step(0, r / u);
    const double k = r / sqrt(square);
    return {1, k, -(k * length), k * r / u};
  }
};

}  // namespace layerlr
