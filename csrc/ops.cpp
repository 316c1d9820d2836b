// torch.ops.layerlr.step_: the same step without a cache, for torch.compile.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

#include "torch_plan.h"

namespace layerlr {
namespace {

/// A step's numbers, from the op `numbers`.
StepConfig config_of(const at::Tensor& numbers) {
  StepConfig config;
  TORCH_CHECK(numbers.scalar_type() == at::kDouble && numbers.dim() == 1 &&
              numbers.nbytes() == sizeof config);
  const at::Tensor row = numbers.contiguous();
  std::memcpy(&config, row.data_ptr<double>(), sizeof config);
  return config;
}

/// Spans are flat (tensor, first row, last row, layer); leaders are flat (layer, tensor of `kept`,
/// place in it) of the layers that keep a number; state holds each parameter's tensors in turn.
void step_op(at::TensorList params, at::TensorList grads, at::TensorList state,
             at::TensorList steps, at::TensorList kept, const at::Tensor& stats,
             const at::Tensor& numbers, const std::optional<at::Tensor>& lr,
             const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf, c10::string_view direction,
             c10::string_view rule, at::IntArrayRef spans, at::IntArrayRef ruled,
             at::IntArrayRef leaders, at::ArrayRef<double> lr_scale) {
  if (found_inf && found_inf->item<double>() != 0) return;
  Plan plan;
  configure(plan, std::string(direction), std::string(rule),
            std::vector<bool>(ruled.begin(), ruled.end()), lr_scale, stats);
  TORCH_CHECK(spans.size() % 4 == 0 && leaders.size() % 3 == 0);
  TORCH_CHECK(grads.size() == params.size() && steps.size() == params.size());
  std::vector<int> parts(params.size());
  for (size_t i = 0; i < spans.size(); i += 4) ++parts.at(spans[i]);
  for (size_t i = 0; i < spans.size(); i += 4) {
    TORCH_CHECK(0 <= spans[i + 3] && spans[i + 3] < int64_t(ruled.size()));
    plan.spans.push_back(
        span_of_rows(params[spans[i]], spans[i], spans[i + 1], spans[i + 2], spans[i + 3]));
  }
  const size_t n_states = params.empty() ? 0 : state.size() / params.size();
  TORCH_CHECK(n_states <= max_states && n_states * params.size() == state.size());
  Staging staging;
  plan.tensors.resize(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    TORCH_CHECK(
        grads[i].sizes() == params[i].sizes() && grads[i].scalar_type() == params[i].scalar_type(),
        "layerlr: gradient ", i, " does not fit its parameter");
    TORCH_CHECK(steps[i].scalar_type() == at::kFloat || steps[i].scalar_type() == at::kDouble);
    Operands x{&params[i], &grads[i], {}, static_cast<int>(n_states), &steps[i]};
    const at::ScalarType wanted = dtype_of(params[i]) == DType::f64 ? at::kDouble : at::kFloat;
    for (size_t k = 0; k < n_states; ++k) {
      x.states[k] = &state[i * n_states + k];
      TORCH_CHECK(x.states[k]->sizes() == params[i].sizes() &&
                      c10::toRealValueType(x.states[k]->scalar_type()) == wanted,
                  "layerlr: state ", k, " of parameter ", i, " does not fit");
    }
    fill_row(plan.tensors[i], staging, x, is_dense(params[i], parts[i] > 1));
  }
  for (size_t i = 0; i < leaders.size(); i += 3) {
    TORCH_CHECK(0 <= leaders[i + 1] && leaders[i + 1] < int64_t(kept.size()));
    const at::Tensor& r = kept[leaders[i + 1]];
    TORCH_CHECK(r.scalar_type() == at::kDouble && 0 <= leaders[i + 2] &&
                leaders[i + 2] < r.numel());
    plan.layers.at(leaders[i]).memory = r.data_ptr<double>() + leaders[i + 2];
  }
  plan.finish();
  StepConfig config = config_of(numbers);
  if (lr) config.lr = lr->item<double>();
  if (grad_scale) config.grad_factor /= grad_scale->item<double>();
  step(plan, config, torch_threads());
  staging.finish();
}

}  // namespace

TORCH_LIBRARY(layerlr, m) {
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor(c!)[] steps, "
      "Tensor(d!)[] kept, Tensor(e!) stats, Tensor numbers, Tensor? lr, Tensor? grad_scale, "
      "Tensor? found_inf, str direction, str rule, int[] spans, int[] ruled, int[] leaders, "
      "float[] lr_scale) -> ()");
  // the tag: another answer at every call, which no compiler may keep
  m.def("numbers(int handle) -> Tensor", {at::Tag::nondeterministic_seeded});
}

TORCH_LIBRARY_IMPL(layerlr, CPU, m) { m.impl("step_", &step_op); }

}  // namespace layerlr
