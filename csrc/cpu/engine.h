// One step over a plan on the CPU. No torch here: threads come in as a function.
#pragma once

#include <functional>

#include "plan.h"

namespace layerlr {

/// Run body(begin, end) over parts of [0, n), perhaps on several threads.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

/// Step every active tensor of the plan. `threads` is how many `parallel` may use.
void step(Plan& plan, const StepConfig& config, int threads, const ParallelFor& parallel);

}  // namespace layerlr
