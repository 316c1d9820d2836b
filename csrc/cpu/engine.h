// One step over a plan on the CPU. No torch here: threads come in as a function.
#pragma once

#include <functional>

#include "plan.h"

namespace layerlr {

/// Run body(begin, end) over parts of [0, n), perhaps on several threads.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

struct Threads {
  int count;  // that `parallel` may use
  ParallelFor parallel;
};

/// Step every active tensor of the plan.
void step(Plan& plan, const StepConfig& config, const Threads& threads);

/// The same in two halves: each layer's sums, and all that follows from them. Between the two they
/// may be added to those that other processes have of the same layers.
void measure(Plan& plan, const StepConfig& config, const Threads& threads, LayerStats* sums);
void apply(Plan& plan, const StepConfig& config, const Threads& threads, const LayerStats* sums);

/// g.g of each layer, before L2 decay.
void norms(Plan& plan, const StepConfig& config, const Threads& threads, double* sums);

}  // namespace layerlr
