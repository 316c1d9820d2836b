#include "cpu_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace layerlr {
namespace {

LayerStats* rows_of(const at::Tensor& sums) {
  return reinterpret_cast<LayerStats*>(sums.data_ptr<double>());
}

}  // namespace

CpuPlan::CpuPlan(const PlanSpec& spec) : BoundPlan(spec) { plan().finish(); }

void CpuPlan::step(const StepConfig& config) {
  if (config.found_inf != 0) return;
  run([&] { layerlr::step(plan(), config, torch_threads()); });
  finish();
}

at::Tensor CpuPlan::measure(const StepConfig& config) {
  const at::Tensor sums = at::zeros({layers(), 4}, at::kDouble);
  if (config.found_inf == 0) {
    run([&] { layerlr::measure(plan(), config, torch_threads(), rows_of(sums)); });
  }
  return sums;
}

void CpuPlan::apply(const StepConfig& config, const at::Tensor& sums) {
  if (config.found_inf != 0) return;
  TORCH_CHECK(sums.sizes() == at::IntArrayRef({layers(), 4}) && sums.is_contiguous());
  run([&] { layerlr::apply(plan(), config, torch_threads(), rows_of(sums)); });
  finish();
}

at::Tensor CpuPlan::norms(const StepConfig& config) {
  const at::Tensor sums = at::empty({layers()}, at::kDouble);
  run([&] { layerlr::norms(plan(), config, torch_threads(), sums.data_ptr<double>()); });
  return sums;
}

}  // namespace layerlr
