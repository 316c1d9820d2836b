// The kernels: one step in one launch, and the same in five.
#pragma once

#include "cuda/block.cuh"

namespace layerlr {

/// The whole step. Blocks walk their lists side by side and wait for each other's sums, so all of
/// them must be resident. A tile is fetched `ahead` tiles before it is measured, and applied up to
/// `lag` tiles after that, when its layer's verdict is there.
///
/// No block waits for ever: a block that waits for a layer has measured every tile of that layer
/// that it owns, since it holds at most `lag` of them and the rest was streamed before; so the
/// first layer without a verdict is waited for by blocks that have done their part, and the others
/// reach theirs without it.
template <template <class> class D>
LAYERLR_KERNEL void __launch_bounds__(tile_threads, 1) step_kernel(const StepArgs args) {
  if (args.config->found_inf != 0) return;
  LAYERLR_DYNAMIC_SHARED(dynamic);
  __shared__ Shared<D> shared;
  Block<D> block(args, shared, dynamic);
  int fetched = 0, measured = 0, applied = 0;
  LayerStats sums;
  const bool whole = args.phase == whole_step;
  block.begin();
  for (int i = 0; i < tiles_ahead; ++i) {
    if (i < args.ahead && block.more()) block.fetch_next(fetched++);
    device::commit();
  }
  while (applied < fetched) {
    const bool measures = measured < fetched && measured - applied < args.lag;
    bool ends;  // the block's part of a segment
    const Job& job = block.job(measures ? measured : applied);
    if (measures) {
      __syncthreads();  // nobody reads the places that are filled now
      if (block.more()) block.fetch_next(fetched++);
      device::commit();
      if (args.ahead < tiles_ahead) device::commit();  // in place of a tile not asked for
      device::wait<tiles_ahead>();
      __syncthreads();  // the tile has landed, for all
      block.measure(measured++);
      ends = args.measured && job.measured;
    } else {
      if (job.kind != stream) block.get_verdict(job.layer, whole);
      block.apply(applied++);
      ends = job.applied && !shared.verdict.keep;
    }
    if (whole && ends && block.complete(job.segment, sums) && threadIdx.x == 0) {
      if (measures) {
        block.conclude(job.layer, sums);
        device::store_release(args.ready + job.layer, block.epoch);
      } else {
        block.conclude_step(job.layer, sums);
      }
    }
  }
  if (whole && block.arrive(&args.sync->exits, gridDim.x)) {
    block.advance_counts();
    if (threadIdx.x == 0) args.sync->epoch = block.epoch;
  }
}

/// The sums of one layer a block, in the order of step_kernel.
template <template <class> class D>
LAYERLR_DEVICE LayerStats sum_layer(const StepArgs& args, int l, Partials& partials) {
  const DeviceLayer& layer = args.layer[l];
  LayerStats sums;
  for (int i = 0; i < layer.segments; ++i) {
    const Segment& s = args.segment[layer.first_segment + i];
    sums = sum_entries(args.tile_sums + s.first_tile, s.tiles, partials);
    if (threadIdx.x == 0) args.segment_sums[layer.first_segment + i] = sums;
  }
  if (layer.segments > 1) {
    __syncthreads();
    sums = sum_entries(args.segment_sums + layer.first_segment, layer.segments, partials);
  }
  return sums;
}

/// After the first pass: a block for each layer.
template <template <class> class D>
LAYERLR_KERNEL void __launch_bounds__(tile_threads, 1) sum_kernel(const StepArgs args) {
  if (args.config->found_inf != 0) return;
  __shared__ Partials partials;
  const LayerStats sums = sum_layer<D>(args, blockIdx.x, partials);
  if (threadIdx.x == 0) args.layer_sums[blockIdx.x] = sums;
}

/// Before the second: a block for each layer.
template <template <class> class D>
LAYERLR_KERNEL void __launch_bounds__(tile_threads, 1) decide_kernel(const StepArgs args) {
  if (args.config->found_inf != 0) return;
  __shared__ Shared<D> shared;
  if (threadIdx.x == 0) {
    Block<D>(args, shared, nullptr).conclude(blockIdx.x, args.layer_sums[blockIdx.x]);
  }
}

/// What is left: a block for each layer and one for the counts.
template <template <class> class D>
LAYERLR_KERNEL void __launch_bounds__(tile_threads, 1) finish_kernel(const StepArgs args) {
  if (args.config->found_inf != 0) return;
  __shared__ Shared<D> shared;
  Block<D> block(args, shared, nullptr);
  const int l = blockIdx.x;
  if (l == args.layers) {
    block.advance_counts();
  } else if (args.measured && !args.rule.update && !args.verdicts[l].keep) {
    const LayerStats sums = sum_layer<D>(args, l, shared.partials);
    if (threadIdx.x == 0) block.conclude_step(l, sums);
  }
}

/// The kernels of a direction.
struct DirectionKernels {
  void (*step)(StepArgs);
  void (*sum)(StepArgs);
  void (*decide)(StepArgs);
  void (*finish)(StepArgs);
};

/// Instantiated in one file for each family of directions.
template <template <class> class D>
DirectionKernels kernels_of() {
  return {step_kernel<D>, sum_kernel<D>, decide_kernel<D>, finish_kernel<D>};
}

}  // namespace layerlr
