// The multi-tensor table that every engine walks. No torch here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "decide.h"
#include "row.h"
#include "step_config.h"

namespace layerlr {

/// Elements a chunk has at most. Chunks start where their layer's part of a tensor starts, so the
/// partial sums depend on the layer alone: not on threads, alignment or place in the list. Of
/// float64 a lane adds 256 squares in a row; 4,096 were up to 16 units in the last place off.
constexpr int64_t chunk_size = int64_t(1) << 15;
constexpr int64_t chunk_size_double = int64_t(1) << 11;

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
  double start_radius = 0;   // that of a layer which starts at zero, under a rule with a radius;
                             // the number of its weights under one that averages
  double* memory = nullptr;  // the number that the rule stores, where it does
  int64_t numel = 0;
};

struct Plan {
  int direction = 0;
  bool has_rule = false;
  RuleConfig rule;
  std::vector<Row> tensors;
  std::vector<Span> spans;  // by tensor
  std::vector<Layer> layers;
  std::vector<Chunk> chunks;         // by layer
  std::vector<LayerStats> partials;  // one a chunk
  std::vector<char> skips;           // one a layer: left alone in this step
  double* stats = nullptr;           // [layers, columns]

  /// Cut the spans into chunks. Call once, when tensors, spans and layers are set.
  void finish();

  /// What the first pass measures of a layer.
  RuleInfo rule_of(const Layer& layer) const {
    return rule_info(layer.ruled ? rule.rule : RuleId::Plain);
  }
};

/// Names in the order of their ids, and of the state tensors of a direction whether each is never
/// below 0.
std::vector<std::string> direction_names();
std::vector<std::string> rule_names();
std::vector<bool> states_of(int direction);

}  // namespace layerlr
