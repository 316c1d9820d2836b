#pragma once

#include "rules/base.h"

namespace layerlr {

/// Rotation by atan(lr) on the sphere of the radius in memory (0: the present norm), in closed
/// form. Carbonnelle & De Vleeschouwer, arXiv:1806.01603, algorithm 1.
struct Layca : UpdateRule {
  static constexpr const char* name = "layca";
  static constexpr bool latches = true;
  double eps;

  LAYERLR_HD explicit Layca(const double* h) : eps(h[0]) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double radius) const {
    const double norm = sqrt(s.ww);
    if (!(norm > 0)) return step(-lr, 1);
    const double perp2 = s.uu - s.wu * s.wu / s.ww;
    if (!(perp2 > eps * eps * s.uu)) return step(0, 0);
    const double perp = sqrt(perp2);
    const double k = 1 / sqrt(1 + lr * lr) * (radius > 0 ? radius / norm : 1);
    if (!(lr > 0)) return step(0, k * norm / perp);
    const double c = lr * norm / perp;
    return {1, k * (1 + c * s.wu / s.ww), -(k * c), k * norm / perp};
  }
};

}  // namespace layerlr
