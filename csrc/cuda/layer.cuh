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

LAYERLR_DEVICE double l2_of(const StepArgs& args) {
  return args.raw || args.config->decoupled != 0 ? 0 : args.config->weight_decay;
}

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
  const double decoupled = config.decoupled != 0 ? config.weight_decay : 0;
  return {layer.ruled != 0,  lr, l2_of(args), decoupled, D::first_order, config.skip != 0,
          args.kept[l],      present.whole != 0};
}

LAYERLR_DEVICE DeviceVerdict device_verdict(const Verdict& v) {
  return {v.scale.grad, v.scale.a, v.scale.b, v.keep};
}

/// The row of statistics of layer l. Of a gradient rule's step the rest is known after the second
/// pass only.
LAYERLR_DEVICE void record(const StepArgs& args, const LayerConfig& c, int l, const Verdict& v) {
  if (args.presence[l].first < 0) return;
  double* row = args.stats + int64_t(l) * columns;
  if (v.keep) {
    row[Column::skipped] += 1;
    return;
  }
  row[Column::gg] = v.seen.gg;
  row[Column::scale] = v.scale.scale;
  row[Column::lr] = c.lr * v.scale.scale;
  row[Column::a] = v.shown_a;
  row[Column::b] = v.scale.b;
  if (!args.rule.update) return;
  row[Column::ww] = v.seen.ww;
  row[Column::uu] = v.seen.uu;
  row[Column::wu] = v.seen.wu;
}
LAYERLR_DEVICE void record_step(const StepArgs& args, int l, const LayerStats& sums) {
  if (args.presence[l].first < 0) return;
  double* row = args.stats + int64_t(l) * columns;
  row[Column::ww] = sums.ww;
  row[Column::uu] = sums.uu;
  row[Column::wu] = sums.wu;
}

}  // namespace layerlr
