#pragma once

#include "rules/rated.h"

namespace layerlr {

/// Adam's step with one second moment a layer: the rate is the inverse of its root, which decide()
/// finds. Zhang et al. 2024, arXiv:2406.16793.
struct AdamMini : Rated {
  static constexpr const char* name = "adam_mini";
  static constexpr bool decays_apart = true;
  static constexpr bool averages = true;

  LAYERLR_HD explicit AdamMini(const double* h) : Rated(h) {}
};

}  // namespace layerlr
