#pragma once

#include "rules/base.h"

namespace layerlr {

/// Rotation by atan(lr), or by the angle of the step lr*u but no more than a cap, on the sphere of
/// the radius in memory (0: of the present norm), in closed form. Carbonnelle & De Vleeschouwer,
/// arXiv:1806.01603, algorithm 1; the cap: arXiv:2608.01284.
struct Layca : UpdateRule {
  static constexpr const char* name = "layca";
  static constexpr bool latches = true;
  static constexpr bool plain_at_zero = true;
  double eps;
  double cap_cos, cap_sin;  // of the largest angle; a cosine above 1: the angle is atan(lr)
  bool current;

  LAYERLR_HD explicit Layca(const double* h)
      : eps(h[0]), cap_cos(h[1]), cap_sin(h[2]), current(h[3] != 0) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double memory) const {
    const double norm = sqrt(s.ww);
    if (!(norm > 0)) return step(-lr, 1);
    const double perp2 = s.uu - s.wu * s.wu / s.ww;
    if (!(perp2 > eps * eps * s.uu)) return step(0, 0);
    const double perp = sqrt(perp2), radius = memory > 0 && !current ? memory : norm;
    double along = 1, across = lr;  // the angle's two sides
    if (cap_cos <= 1) {
      along = norm - lr * s.wu / norm;
      across = lr * perp;
    }
    const double side = sqrt(along * along + across * across);
    double cosine = along / side, sine = across / side;
    if (cosine < cap_cos && cap_cos <= 1) {
      cosine = cap_cos;
      sine = cap_sin;
    }
    const double b = sine * radius / perp;
    if (!(lr > 0)) return step(0, radius / perp);
    return {1, cosine * (radius / norm) + b * s.wu / s.ww, -b, b / lr};
  }
};

}  // namespace layerlr
