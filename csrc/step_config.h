// The numbers of one step: a float64 array whose order is declared here and nowhere else. Python
// fills it, every engine reads it.
#pragma once

#include <cstddef>

#include "directions/all.h"
#include "rules/all.h"

namespace layerlr {

struct StepConfig {
  double lr = 0;
  double l2 = 0;               // weight decay that is added to the gradient
  double decoupled_decay = 0;  // weight decay that is not
  double grad_factor = 1;      // on every gradient: -1 to maximize, over the scale of a scaled loss
  double skip = 0;             // other than 0: leave layers with a sum that is not finite alone
  double found_inf = 0;        // other than 0: change nothing at all
  double plain = 1;            // on lr, for layers under the rule that take plain steps at first
  double taken = 0;            // other than 0: rate of the step that weights have taken already
  double direction[max_direction_hyper] = {};
  double rule[max_rule_hyper] = {};
};

/// Call f(name, place in the array) for every entry, and for the end of the array.
template <class F>
void for_config_places(F f) {
#define LAYERLR_PLACE(entry) f(#entry, offsetof(StepConfig, entry) / sizeof(double))
  LAYERLR_PLACE(lr);
  LAYERLR_PLACE(l2);
  LAYERLR_PLACE(decoupled_decay);
  LAYERLR_PLACE(grad_factor);
  LAYERLR_PLACE(skip);
  LAYERLR_PLACE(found_inf);
  LAYERLR_PLACE(plain);
  LAYERLR_PLACE(taken);
  LAYERLR_PLACE(direction);
  LAYERLR_PLACE(rule);
#undef LAYERLR_PLACE
  f("size", sizeof(StepConfig) / sizeof(double));
}

}  // namespace layerlr
