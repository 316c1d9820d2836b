// A plan on the CPU.
#pragma once

#include "bound_plan.h"

namespace layerlr {

class CpuPlan : public BoundPlan {
 public:
  explicit CpuPlan(const PlanSpec& spec);

  void step(const StepConfig& config);

  /// The same in two halves: the sums of each layer [layers, 4], and what follows from them.
  at::Tensor measure(const StepConfig& config);
  void apply(const StepConfig& config, const at::Tensor& sums);

  /// g.g of each layer [layers], before L2 decay.
  at::Tensor norms(const StepConfig& config);

 private:
  int64_t layers() { return plan().layers.size(); }
  /// Without the interpreter's lock.
  template <class Body>
  void run(Body body) {
    const Use use(*this);
    py::gil_scoped_release release;
    body();
  }
};

}  // namespace layerlr
