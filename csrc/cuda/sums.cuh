// Sums of a layer, in an order that the layer alone decides.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tables.h"

namespace layerlr {

/// The four sums of each worker's elements.
struct alignas(16) Partials {
  double of[workers][4];
};

/// Products of floats are exact in double, so that a fused add rounds once as two do; of doubles it
/// rounds less.
template <class T>
LAYERLR_DEVICE void add(double& sum, T x, T y) {
  sum = device::fused_add(static_cast<double>(x), static_cast<double>(y), sum);
}

/// Add `count` rows of four numbers, read(row, column), by one warp: a lane has every eighth row of
/// one column. All lanes return the sums.
template <class Read>
LAYERLR_DEVICE LayerStats add_rows(int count, Read read) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  double x = 0;
#pragma unroll 16
  for (int row = lane / 4; row < count; row += 8) x += read(row, lane % 4);
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(all, x, distance);
  return {__shfl_sync(all, x, 0), __shfl_sync(all, x, 1), __shfl_sync(all, x, 2),
          __shfl_sync(all, x, 3)};
}

/// The same over rows that other blocks have written, and may write again once lane 0 tells of it.
LAYERLR_DEVICE LayerStats add_fresh(const LayerStats* rows, int count) {
  const LayerStats sums = add_rows(count, [&](int row, int column) {
    return device::read_fresh(reinterpret_cast<const double*>(rows + row) + column);
  });
  __syncwarp();  // a shuffle orders no memory
  return sums;
}

}  // namespace layerlr
