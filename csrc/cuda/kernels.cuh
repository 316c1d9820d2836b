// The kernels: a step, or one of its passes; and what lies between the passes.
#pragma once

#include "cuda/adder.cuh"
#include "cuda/dispatcher.cuh"

namespace layerlr {

/// Step counts: a tensor's stands still where all its layers were left alone.
LAYERLR_DEVICE void advance_counts(const StepArgs& args) {
  for (int i = threadIdx.x; i < args.tensors; i += block_threads) {
    const DeviceCount& count = args.counts[i];
    if (!count.step) continue;
    bool skipped = args.measured;
    for (int k = 0; k < count.layers && skipped; ++k) {
      skipped = device::read_fresh(&args.verdicts[args.tensor_layers[count.first_layer + k]].skip);
    }
    if (skipped) continue;
    if (count.is_double) {
      *static_cast<double*>(count.step) += 1;
    } else {
      *static_cast<float*>(count.step) += 1;
    }
  }
}

/// The last block to end leaves the counters as the next launch wants them.
template <template <class> class D>
LAYERLR_DEVICE void end_block(const StepArgs& args, Shared<D>& shared) {
  DeviceSync& sync = *args.sync;
  meet();
  if (threadIdx.x == 0) shared.last = device::add_acq_rel(&sync.exits, 1) + 1 == gridDim.x;
  meet();
  if (!shared.last) return;
  if (args.phase != first_pass) advance_counts(args);
  if (threadIdx.x == 0) {
    ++sync.epoch;
    sync.ticket = sync.exits = 0;
  }
}

/// Blocks that a multiprocessor has room for, as the compiler is told. A third one costs registers
/// that keep loads in flight.
template <template <class> class D, class F>
constexpr int resident_blocks = F::any || (F::coded && D<float>::states > 2) ? 1 : 2;

/// A step in one launch, or one of its passes. Blocks take items in the order of the list. None
/// waits for ever: an item waits only for items before it in the list, and of all items that are
/// not done the first has been taken by a block that has nothing else left to do.
template <template <class> class D, class F>
LAYERLR_KERNEL void __launch_bounds__(block_threads, resident_blocks<D, F>)
    step_kernel(const LAYERLR_PARAMETER StepArgs args) {
  if (args.config->found_inf != 0) return;
  __shared__ Shared<D> shared;
  if (threadIdx.x < workers) {
    work_on_items<D, F>(shared);
  } else if (threadIdx.x < workers + 32) {
    Dispatcher<D, F>(args, shared).run();
  } else {
    Adder<D>(args, shared).run();
  }
  end_block(args, shared);
}

/// Between the passes, where each is a launch: a thread for each layer.
template <template <class> class D>
LAYERLR_KERNEL void decide_kernel(const LAYERLR_PARAMETER StepArgs args) {
  const int l = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (args.config->found_inf != 0 || l >= args.layers) return;
  conclude(args, l, step_of_layer<D<float>>(args, l), args.layer_sums[l]);
}

typedef void (*Kernel)(StepArgs);

/// The kernels of a direction.
struct DirectionKernels {
  Kernel step[families];
  Kernel decide;
};

/// Instantiated in one file for each family of directions.
template <template <class> class D>
DirectionKernels kernels_of() {
  return {{step_kernel<D, Floats<false>>, step_kernel<D, Floats<true>>, step_kernel<D, AnyDtype>},
          decide_kernel<D>};
}

}  // namespace layerlr
