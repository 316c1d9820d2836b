// What the GPU kernels walk, in device memory: plain structs. schedule.cpp fills what is fixed,
// device_plan.cpp what a step may change.
#pragma once

#include "decide.h"
#include "directions/all.h"
#include "plan.h"

namespace layerlr {

#if !defined(LAYERLR_WORKERS)  // a test may take smaller blocks
#define LAYERLR_WORKERS 256
#endif
/// Threads of a block that work on elements. Two warps more: one takes tickets, one adds sums.
constexpr int workers = LAYERLR_WORKERS;
constexpr int block_threads = workers + 64;

/// Elements that the workers have in hand at once: two vectors of four each.
constexpr int tile_elements = 2 * 4 * workers;

/// Tiles of an item, the unit that a block takes and sums, where there is something to measure and
/// where not. Partial sums depend on the layer alone, not on the grid.
LAYERLR_HD constexpr int item_tiles(bool measured) { return measured ? 4 : 2; }

/// Items of a segment of a layer: the last of them to be done adds the sums of all.
#if !defined(LAYERLR_SEGMENT_ITEMS)
#define LAYERLR_SEGMENT_ITEMS 512
#endif
constexpr int segment_items = LAYERLR_SEGMENT_ITEMS;

/// Which kernel of a direction runs a plan: for float32 and bfloat16, where arrays have codecs or
/// not, and a small one for whatever else there is in it.
enum Family : int32_t { plain_family, coded_family, any_family, families };

/// What the rule scales, if there is anything to measure.
enum Order : int32_t { unmeasured, gradient_rule, update_rule };

/// What a launch of the step does: both passes, each layer's second after its first, or one.
enum Phase : int32_t { first_pass, second_pass, whole_step };

// -- read afresh by every step ------------------------------------------------------------------

/// Some of the numbers may come from tensors on the device.
using DeviceConfig = StepConfig;

/// An array of a span, from where the span begins.
struct DeviceArray {
  char* data;
  int32_t block_bytes;   // of a block, or of code_block elements where there are no codes
  int32_t vector_bytes;  // four elements, or 16 bytes if those are less: what is read at once
};

/// The arrays of a span: w, g, states, what 16-bit weights have beside them, scales of the states.
enum ArrayIndex {
  array_w,
  array_g,
  array_state,
  array_aux = array_state + max_states,
  array_scales,
  arrays = array_scales + max_states
};

/// How the states of a tensor are stored, all of them alike.
enum class Stored : int32_t { plain, bfloat16, codes };

struct alignas(16) DeviceSpan {
  DeviceArray array[arrays];  // without a gradient it takes no part in this step
  const void* step;           // count of the tensor's steps
  double lr_scale;
  int64_t size;   // elements, of a tensor with codes as many as if its blocks were whole
  int64_t begin;  // elements of the tensor before the span
  int64_t seed;   // of stochastic rounding
  int32_t dtype, step_is_double;
  int32_t weights;  // their codec
  Stored states;
  int32_t block;  // elements that share a scale
  int32_t ruled;
};

/// A tensor's count of steps, and its layers in tensor_layers.
struct DeviceCount {
  void* step;  // null: takes no part in this step
  int32_t is_double, first_layer, layers, unused;
};

/// Which of a layer's spans have a gradient.
struct DevicePresence {
  int32_t first;  // index of the first that has one, or -1
  int32_t whole;  // all have
};

// -- fixed as long as the plan is ---------------------------------------------------------------

struct alignas(16) DeviceLayer {
  double lr_scale, start_radius;
  int32_t ruled;
  int32_t first_slot, slots;
  int32_t first_segment;
};

/// StepArgs::item_elements of a span, or what is left of it, in one of the two passes.
struct alignas(16) Item {
  int32_t span, number;  // which of the span's
  int32_t layer;
  uint32_t slot : 31, second : 1;  // of its sums; the pass
};

/// What the rule says of a layer.
struct DeviceVerdict {
  double grad, a, b;
  int32_t skip;
};

struct DeviceSync {
  uint32_t epoch;   // of the last step
  uint32_t ticket;  // the next item that nobody has taken
  uint32_t exits;   // blocks that have finished
};

/// Arguments of a kernel.
struct StepArgs {
  int32_t direction;
  Family family;
  Phase phase;
  RuleConfig rule;
  bool measured;  // there is something to measure
  bool raw;       // no weight decay is added to gradients
  int32_t tensors, layers, items;
  int32_t item_elements;
  int32_t blocks;  // of the grid, at most; 0: as many as there is room for

  const DeviceConfig* config;
  const DeviceSpan* spans;
  const DeviceCount* counts;
  const DevicePresence* presence;
  double* const* memory;  // the number that each layer stores, or null

  const DeviceLayer* layer;
  const Item* item;
  const int32_t* tensor_layers;

  LayerStats* slot_sums;
  LayerStats* segment_sums;
  LayerStats* layer_sums;
  uint32_t* segment_arrivals;
  uint32_t* layer_arrivals;
  uint32_t* ready;  // epoch in which the layer's verdict was given
  DeviceVerdict* verdicts;
  DeviceSync* sync;
  double* stats;

  /// Of a plan without a rule the gradients may be measured all the same.
  LAYERLR_HD Order order() const {
    if (phase == first_pass && !measured) return gradient_rule;
    return !measured ? unmeasured : rule.update ? update_rule : gradient_rule;
  }
};

}  // namespace layerlr
