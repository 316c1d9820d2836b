// The warp of a block that adds the workers' sums and decides on layers.
#pragma once

#include "cuda/block.cuh"
#include "cuda/layer.cuh"

namespace layerlr {

/// Adds the sums of item k - 1 while the workers are at item k, and decides on layers. All lanes do
/// the same but for what only one may do.
template <template <class> class D>
struct Adder {
  static constexpr unsigned all = 0xffffffffu;
  const StepArgs& args;
  Shared<D>& shared;
  const int lane = threadIdx.x % 32;
  const uint32_t epoch;

  LAYERLR_DEVICE Adder(const StepArgs& args, Shared<D>& shared)
      : args(args), shared(shared), epoch(args.sync->epoch + 1) {}

  struct Done {
    int layer, slot;
    bool second, sums, active;
  };

  LAYERLR_DEVICE void run() {
    Done done{};
    for (int k = 0;; ++k) {
      const Work& now = shared.work[k & 1];
      meet();
      if (done.sums) finish(done, shared.partials[~k & 1]);
      if (now.waits) meet();  // for what is finished by now, perhaps
      if (now.what == ends) return;
      done = {now.layer, now.slot, now.second, now.sums, now.what != nothing};
    }
  }

  LAYERLR_DEVICE void finish(const Done& done, const Partials& partials) {
    const DeviceLayer layer = args.layer[done.layer];
    const bool decides = !done.second && args.phase == whole_step;
    ComingStep step;
    if (decides) step = step_of_layer<D<float>>(args, done.layer);
    LayerStats sums;
    if (done.active) {
      sums = add_rows(workers, [&](int row, int column) { return partials.of[row][column]; });
    }
    if (!add_layer(layer, done, sums) || lane != 0) return;
    if (decides) {
      conclude(args, done.layer, step, sums);
      device::store_release(args.ready + done.layer, epoch);
    } else if (done.second) {
      conclude_step(args, done.layer, sums);
    } else {
      args.layer_sums[done.layer] = sums;
    }
  }

  /// Put an item's sums into its slot. The last one of a segment adds the segment's, the last
  /// segment the layer's: then `sums` are those, and it is true.
  LAYERLR_DEVICE bool add_layer(const DeviceLayer& layer, const Done& done, LayerStats& sums) {
    const int slots = layer.slots;
    if (slots == 1) return true;
    const int segment = (done.slot - layer.first_slot) / segment_items;
    const int first = segment * segment_items, left = slots - first;
    const int count = left < segment_items ? left : segment_items;
    const int place = layer.first_segment + segment;
    if (lane == 0) args.slot_sums[done.slot] = sums;
    if (!is_last(args.segment_arrivals + place, count)) return false;
    sums = add_fresh(args.slot_sums + layer.first_slot + first, count);
    if (slots <= segment_items) return true;
    const int segments = (slots + segment_items - 1) / segment_items;
    if (lane == 0) args.segment_sums[place] = sums;
    if (!is_last(args.layer_arrivals + done.layer, segments)) return false;
    sums = add_fresh(args.segment_sums + layer.first_segment, segments);
    return true;
  }

  /// Arrive at a counter: whether all others of `count` have. What the workers and this lane have
  /// written is seen by whoever is told so.
  LAYERLR_DEVICE bool is_last(uint32_t* counter, int count) {
    bool last = false;
    if (lane == 0) {
      last = device::add_acq_rel(counter, 1) + 1 == static_cast<unsigned>(count);
      if (last) *counter = 0;
    }
    __syncwarp();
    return __shfl_sync(all, static_cast<int>(last), 0) != 0;
  }
};

}  // namespace layerlr
