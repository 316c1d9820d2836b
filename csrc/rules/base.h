// What a rule declares: its flags, its hyper-parameters by name, and its scale.
#pragma once

#include "core.h"

namespace layerlr {

/// A rule that scales the gradient before the state sees it.
struct GradientRule {
  static constexpr bool update = false;
  static constexpr bool measures_ww = false;   // the first pass reads the weights
  static constexpr bool raw_gradient = false;  // gg is taken before L2 decay is added
  static constexpr bool latches = false;
  static constexpr bool decays_apart = false;
  static constexpr bool averages = false;
  static constexpr bool plain_at_zero = false;  // a layer of zeros takes the plain step

  LAYERLR_HD static LayerScale factor(double f) { return {f, 1, 0, f}; }
};

/// A rule that scales the step.
struct UpdateRule {
  static constexpr bool update = true;
  static constexpr bool measures_ww = true;
  static constexpr bool raw_gradient = false;
  static constexpr bool latches = false;       // the memory is the layer's radius, see decide.h
  static constexpr bool decays_apart = false;  // decoupled decay is no part of the step it sees
  static constexpr bool averages = false;      // the memory is a running mean of gg/n, see decide.h
  static constexpr bool plain_at_zero = false;

  /// w <- w + b*u; shown: the number for people to read.
  LAYERLR_HD static LayerScale step(double b, double shown) { return {1, 1, b, shown}; }
};

}  // namespace layerlr
