#pragma once

#include "rules/base.h"

namespace layerlr {

/// b = -lr*r, r = min(|w|, clip)/|u|, u with decoupled decay; trust_clip: r is at most 1. You et
/// al. 2020, arXiv:1904.00962, algorithm 2.
struct Lamb : UpdateRule {
  static constexpr const char* name = "lamb";
  double clip;
  bool trust_clip;

  LAYERLR_HD explicit Lamb(const double* h) : clip(h[0]), trust_clip(h[1] != 0) {}
  LAYERLR_HD LayerScale scale(const LayerStats& s, double lr, double, double) const {
    const double norm = sqrt(s.ww), u = sqrt(s.uu), w = norm < clip ? norm : clip;
    double r = 1;
    if (w > 0 && u > 0) {
      r = w / u;
      if (trust_clip && r > 1) r = 1;
    }
    return step(u > 0 ? -(lr * r) : 0, r);
  }
};

}  // namespace layerlr
