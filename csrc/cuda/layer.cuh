// From the sums of a layer to its verdict, by one thread.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tables.h"

namespace layerlr {

/// Number of the coming step of a span's tensor.
LAYERLR_DEVICE double coming_step(const void* count, bool is_double) {
  return 1 + (is_double ? device::read(static_cast<const double*>(count))
                        : double(device::read(static_cast<const float*>(count))));
}

LAYERLR_DEVICE double l2_of(const StepArgs& args) { return args.raw ? 0 : args.config->l2; }

/// A direction at the coming step of a layer.
struct ComingStep {
  double t = 1;     // its number
  double rate = 1;  // the direction's, on lr
  bool first_order = true;
};

/// D: any type of the direction.
template <class D>
LAYERLR_DEVICE ComingStep step_of_layer(const StepArgs& args, int l) {
  double t = 1;
  const int first = args.presence[l].first;
  if (first >= 0) t = coming_step(args.spans[first].step, args.spans[first].step_is_double);
  return {t, D::rate(args.config->direction, t), D::first_order};
}

/// Decide on layer l: its verdict, and its row of statistics. No part of the kernels that call it:
/// the rules are compiled once for all of them.
LAYERLR_OUTLINED void conclude(const StepArgs& args, int l, ComingStep step, LayerStats sums) {
  const DeviceConfig& config = *args.config;
  const DeviceLayer& layer = args.layer[l];
  const DevicePresence present = args.presence[l];
  const bool absent = present.first < 0;
  const LayerConfig c{layer.ruled != 0,
                      config.lr * layer.lr_scale * step.rate,
                      l2_of(args),
                      config.decoupled_decay,
                      step.first_order,
                      config.skip != 0,
                      absent ? nullptr : args.memory[l],
                      present.whole != 0,
                      layer.start_radius,
                      config.plain,
                      config.taken,
                      step.t};
  RuleConfig rule = args.rule;
  for (int k = 0; k < max_rule_hyper; ++k) rule.hyper[k] = config.rule[k];  // a graph's are old
  const Verdict v = decide(rule, c, sums);
  args.verdicts[l] = {v.scale.grad, v.scale.a, v.scale.b, v.skip};
  if (!absent) write_row(args.stats + int64_t(l) * columns, v, c.lr);
}
LAYERLR_DEVICE void conclude_step(const StepArgs& args, int l, const LayerStats& sums) {
  if (args.presence[l].first >= 0) write_step(args.stats + int64_t(l) * columns, sums);
}

}  // namespace layerlr
