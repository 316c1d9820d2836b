// The multi-tensor table that every engine walks. No torch here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "directions/all.h"
#include "rules/all.h"

namespace layerlr {

enum class DType : int32_t { f32, f64, bf16, f16 };

/// Elements a chunk has at most. Chunks start where their layer's part of a tensor starts, so the
/// partial sums depend on the layer alone: not on threads, alignment or place in the list.
constexpr int64_t chunk_size = int64_t(1) << 15;

/// Columns of the statistics, float64, one row a layer. uu and wu are of the step that the rule
/// saw; a and b are with respect to it.
enum Column { ww, gg, uu, wu, scale, lr, a, b, skipped, columns };

struct TensorRow {
  void* param = nullptr;
  const void* grad = nullptr;
  void* state[max_states] = {};
  void* step = nullptr;  // the count of steps taken, float32 or float64
  DType dtype = DType::f32;
  bool step_is_double = false;
  bool active = false;  // takes part in this step
};

/// A part of one tensor, all of it in one layer.
struct Span {
  int32_t tensor;
  int32_t layer;
  int64_t begin, end;  // elements
};

struct Chunk {
  int32_t tensor;
  int32_t count;
  int64_t begin;
};

struct Layer {
  int32_t chunk_begin = 0, chunk_end = 0;
  bool ruled = false;
  double lr_scale = 1;
  double* radius = nullptr;  // stored radius, where the rule keeps one
  int64_t numel = 0;
};

/// What one step reads afresh.
struct StepConfig {
  double lr = 0;
  double weight_decay = 0;
  bool decoupled = false;
  bool maximize = false;
  bool skip = false;  // leave layers with a sum that is not finite alone
  double direction_hyper[max_direction_hyper] = {};
};

struct Plan {
  int direction = 0;
  bool has_rule = false;
  RuleId rule = RuleId::Plain;
  double rule_hyper[max_rule_hyper] = {};
  std::vector<TensorRow> tensors;
  std::vector<Span> spans;  // by tensor
  std::vector<Layer> layers;
  std::vector<Chunk> chunks;         // by layer
  std::vector<LayerStats> partials;  // one a chunk
  std::vector<char> kept;            // one a layer: left alone in this step
  double* stats = nullptr;           // [layers, columns]

  /// Cut the spans into chunks. Call once, when tensors, spans and layers are set.
  void finish();

  /// L2 coefficient: decay that is added to the gradient.
  static double l2(const StepConfig& c) { return c.decoupled ? 0 : c.weight_decay; }

  /// The rule of one layer.
  RuleId rule_of(const Layer& layer) const { return layer.ruled ? rule : RuleId::Plain; }
};

/// A rule's answer in terms of w and the bare direction, and what is left alone.
struct Verdict {
  LayerScale scale;    // as applied
  LayerStats seen;     // the sums that the rule saw
  double shown_a = 1;  // a with respect to them
  bool keep = false;
};

/// From a layer's sums to its scale: decay, edge rules, the radius. Shared by all engines.
Verdict decide(const Plan& plan, const StepConfig& c, const Layer& layer, const LayerStats& sums,
               double lr, bool first_order, bool whole);

/// Names in the order of their ids.
std::vector<std::string> direction_names();
std::vector<std::string> rule_names();

}  // namespace layerlr
