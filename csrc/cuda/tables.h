// What the GPU kernels walk, in device memory: plain structs. schedule.cpp fills what is fixed,
// device_plan.cpp what a step may change.
#pragma once

#include "decide.h"
#include "directions/all.h"
#include "plan.h"

namespace layerlr {

#if !defined(LAYERLR_TILE_THREADS)  // a test may take smaller tiles
#define LAYERLR_TILE_THREADS 256
#endif
/// Threads of a block. Each has two vectors of four elements of a tile, of one in float64.
constexpr int tile_threads = LAYERLR_TILE_THREADS;

/// Elements of a tile, the unit that a block reads, measures and writes, and of the partial sums:
/// they depend on the layer alone, not on the grid.
LAYERLR_HD constexpr int tile_elements(DType dtype, int threads = tile_threads) {
  return (dtype == DType::f64 ? 4 : 8) * threads;
}
/// Tiles of a segment at most, for each thread of the block that adds their sums.
constexpr int segment_tiles = 8;

/// Tiles that a block asks for before it needs them, where they fit, and places that it keeps free
/// beyond what it holds of one layer, so that it goes on while that layer is summed.
constexpr int tiles_ahead = 2;
constexpr int spare_tiles = 2;

// -- read afresh by every step ------------------------------------------------------------------

/// Some of the numbers may come from tensors on the device.
using DeviceConfig = StepConfig;

struct DeviceRow {
  char* param;
  char* state[max_states];
  void* step;
  int32_t dtype, step_is_double;
  int32_t first_layer, layers;  // its layers, in tensor_layers
  Held held;
  char* extra;   // what 16-bit weights have beside them
  int64_t seed;  // of stochastic rounding
};

/// Which of a layer's tensors have a gradient.
struct DevicePresence {
  int32_t first;  // index of the first that has one, or -1
  int32_t whole;  // all have
};

// -- fixed as long as the plan is ---------------------------------------------------------------

struct DeviceLayer {
  double lr_scale;
  int32_t ruled;
  int32_t first_segment, segments;
};

/// Some tiles of a layer, one after another.
struct Segment {
  int64_t first_tile;
  int32_t tiles, layer;
  int32_t blocks;  // that own some of them
};

/// What a block does with a tile.
enum Kind : int32_t {
  stream,  // measure it, and let go
  hold,    // measure it, keep it on chip, apply
  again,   // read it (once more) and apply
};

/// Tiles of one block that follow each other at equal distances within one tensor and segment.
struct Run {
  int64_t begin, end;  // elements: the first tile's, the span's
  int64_t tile;        // number of the first tile in the plan
  int32_t tensor, layer, segment;
  int32_t count, stride;  // tiles, tiles from one to the next
  int32_t kind;
  int8_t ruled;              // the layer is
  int8_t measured, applied;  // after the last one, the block has measured, applied its whole part
};

/// What the rule says of a layer, as its blocks need it.
struct DeviceVerdict {
  double grad, a, b;
  int32_t keep;
};

struct DeviceSync {
  uint32_t epoch;  // of the step under way
  uint32_t exits;  // blocks that have finished it
};

/// Where a tile lies in shared memory. The first ring holds a tile until it is applied, the second
/// until it is measured.
struct Rings {
  int32_t bytes[2];  // of a place
  int32_t places[2];
  int32_t ring[2 + max_states];    // of w, g, the states
  int32_t offset[2 + max_states];  // of each in its place
  int32_t u_offset;                // of the step, in the first ring
  bool u_is_g;                     // it takes the place of g

  LAYERLR_HD int32_t bytes_of_tiles() const { return bytes[0] * places[0] + bytes[1] * places[1]; }
  /// Shared memory of a block: the tiles, and their jobs.
  LAYERLR_HD int32_t bytes_in_all() const;
};

/// A tile on its way through a block.
struct Job {
  const char* g;  // null: no gradient
  int64_t tile, begin;
  int32_t count, tensor, layer, segment;
  Kind kind;
  bool ruled, measured,
      applied;  // the last two: the block's last of its segment, in one sense and the other
  double t;     // number of the coming step
};

LAYERLR_HD int32_t Rings::bytes_in_all() const {
  return bytes_of_tiles() + places[0] * static_cast<int32_t>(sizeof(Job));
}

/// What a launch of step_kernel does: one pass over all tiles, or both and what lies between.
enum Phase : int32_t { first_pass = stream, second_pass = again, whole_step };

/// Arguments of a kernel.
struct StepArgs {
  int32_t direction;
  Phase phase;
  RuleConfig rule;
  bool measured;  // there is something to measure
  bool raw;       // no weight decay is added to gradients
  int32_t tensors, layers, blocks;
  int32_t ahead;  // tiles asked for before they are needed
  int32_t lag;    // tiles measured before the first must be applied
  Rings rings;

  const DeviceConfig* config;
  const char* const* grads;
  const DevicePresence* presence;
  double* const* kept;  // number that each layer keeps, or null
  const DeviceRow* rows;

  const DeviceLayer* layer;
  const Segment* segment;
  const Run* runs;
  const int32_t* first_run;  // of each block, and the end
  const int32_t* tensor_layers;

  LayerStats* tile_sums;
  LayerStats* segment_sums;
  LayerStats* layer_sums;
  uint32_t* segment_arrivals;
  uint32_t* layer_arrivals;
  uint32_t* ready;  // epoch in which the layer's verdict was given
  DeviceVerdict* verdicts;
  DeviceSync* sync;
  double* stats;
};

}  // namespace layerlr
