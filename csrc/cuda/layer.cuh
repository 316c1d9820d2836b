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

/// What decide() wants to know of layer l. D: any type of the direction.
template <class D>
LAYERLR_DEVICE LayerConfig layer_config(const StepArgs& args, const DeviceLayer& layer, int l) {
  const DeviceConfig& config = *args.config;
  const DevicePresence present = args.presence[l];
  double t = 1;
  if (present.first >= 0) {
    const DeviceSpan& span = args.spans[present.first];
    t = coming_step(span.step, span.step_is_double);
  }
  const double lr = config.lr * layer.lr_scale * D::rate(config.direction, t);
  return {layer.ruled != 0,
          lr,
          l2_of(args),
          config.decoupled_decay,
          D::first_order,
          config.skip != 0,
          present.first < 0 ? nullptr : args.memory[l],
          present.whole != 0,
          layer.start_radius,
          config.plain,
          config.taken,
          t};
}

/// Decide on layer l: its verdict, and its row of statistics.
LAYERLR_DEVICE void conclude(const StepArgs& args, const LayerConfig& c, int l,
                             const LayerStats& sums) {
  const Verdict v = decide(args.rule, c, sums);
  args.verdicts[l] = {v.scale.grad, v.scale.a, v.scale.b, v.skip};
  if (args.presence[l].first >= 0) write_row(args.stats + int64_t(l) * columns, v, c.lr);
}
LAYERLR_DEVICE void conclude_step(const StepArgs& args, int l, const LayerStats& sums) {
  if (args.presence[l].first >= 0) write_step(args.stats + int64_t(l) * columns, sums);
}

}  // namespace layerlr
