// Four sums over a block, in an order that the number of its threads alone decides.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tables.h"

namespace layerlr {

constexpr int warps = tile_threads / 32;

/// One warp's share of the four sums, of every warp.
struct Partials {
  double of[warps][4];
};

/// Sums over the lanes of a warp, into its row. Lanes give away half of their sums twice, and are
/// then eight for each: six exchanges rather than twenty.
LAYERLR_DEVICE void sum_warp(const LayerStats& s, Partials& partials) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool upper = lane & 16, odd = lane & 8;
  double x = upper ? s.uu : s.ww, y = upper ? s.wu : s.gg;
  x += __shfl_xor_sync(all, upper ? s.ww : s.uu, 16);
  y += __shfl_xor_sync(all, upper ? s.gg : s.wu, 16);
  double z = odd ? y : x;
  z += __shfl_xor_sync(all, odd ? x : y, 8);
  for (int distance = 4; distance; distance /= 2) z += __shfl_xor_sync(all, z, distance);
  if (lane % 8 == 0) partials.of[warp][lane / 8] = z;
}

/// Sum number `which` (ww, gg, uu, wu) over the warps, after a barrier.
LAYERLR_DEVICE double sum_warps(const Partials& partials, int which) {
  double total = partials.of[0][which];
  for (int w = 1; w < warps; ++w) total += partials.of[w][which];
  return total;
}

/// The sum of `count` entries, added in a fixed order by the whole block; every thread has it.
LAYERLR_DEVICE LayerStats sum_entries(const LayerStats* entries, int count, Partials& partials) {
  LayerStats s;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += tile_threads) {
    const double* p = reinterpret_cast<const double*>(entries + i);
    s.ww += device::read_fresh(p);
    s.gg += device::read_fresh(p + 1);
    s.uu += device::read_fresh(p + 2);
    s.wu += device::read_fresh(p + 3);
  }
  __syncthreads();
  sum_warp(s, partials);
  __syncthreads();
  return {sum_warps(partials, 0), sum_warps(partials, 1), sum_warps(partials, 2),
          sum_warps(partials, 3)};
}

/// Products of floats are exact in double, so that a fused add rounds once as two do; of doubles it
/// rounds less.
template <class T>
LAYERLR_DEVICE void add(double& sum, T x, T y) {
  sum = device::fused_add(static_cast<double>(x), static_cast<double>(y), sum);
}

}  // namespace layerlr
