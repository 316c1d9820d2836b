// Which block does what with which tile, and where the tile lies meanwhile.
#pragma once

#include <vector>

#include "cuda/engine.h"
#include "cuda/tables.h"

namespace layerlr {

/// What may be chosen freely: results do not depend on it. 0: as it suits the device.
struct Tuning {
  int blocks = 0;      // of the grid
  int hold = 0;        // tiles of a layer that a block keeps on chip, at most
  bool plain = false;  // several launches
};

struct Schedule {
  bool plain = false;
  int blocks = 0, ahead = 0, lag = 0;
  Rings rings{};
  int64_t tiles = 0;
  std::vector<DeviceLayer> layers;
  std::vector<Segment> segments;
  std::vector<Run> runs;
  std::vector<int32_t> first_run;      // of each block, and the end
  std::vector<int32_t> tensor_layers;  // by tensor
  std::vector<int32_t> first_layer;    // of each tensor in it, and the end
};

/// Schedule of a plan whose tensors, spans and layers are set. `measured`: layers have sums.
/// Throws std::invalid_argument where the tiles do not fit into the device's shared memory.
Schedule make_schedule(const Plan& plan, bool measured, const DeviceInfo& device,
                       const Tuning& tuning);

}  // namespace layerlr
