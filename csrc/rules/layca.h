#pragma once

#include "core.h"

namespace layerlr {

/// Rotation by atan(lr) on the sphere of the given radius (0: the present norm), in closed form.
/// Carbonnelle & De Vleeschouwer, arXiv:1806.01603, algorithm 1. h: eps.
struct Layca {
  static constexpr const char* name = "layca";
  static constexpr bool update = true;
  static constexpr bool measures_ww = true;
  static constexpr bool raw_gradient = false;
  static constexpr bool latches = true;
  LAYERLR_HD static LayerScale scale(const LayerStats& s, double lr, double, double radius,
                                     const double* h) {
    const double norm = sqrt(s.ww);
    if (!(norm > 0)) return {1, 1, -lr, 1};
    const double perp2 = s.uu - s.wu * s.wu / s.ww;
    if (!(perp2 > h[0] * h[0] * s.uu)) return {1, 1, 0, 0};
    const double perp = sqrt(perp2);
    const double k = 1 / sqrt(1 + lr * lr) * (radius > 0 ? radius / norm : 1);
    if (!(lr > 0)) return {1, 1, 0, k * norm / perp};
    const double c = lr * norm / perp;
    return {1, k * (1 + c * s.wu / s.ww), -(k * c), k * norm / perp};
  }
};

}  // namespace layerlr
