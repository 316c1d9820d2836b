// In which order blocks take the items of a step.
#pragma once

#include <vector>

#include "cuda/engine.h"
#include "cuda/tables.h"

namespace layerlr {

/// What may be chosen freely: results do not depend on it. 0: as it suits the device.
struct Tuning {
  int blocks = 0;    // of the grid, at most
  int distance = 0;  // items between a layer's last first-pass item and its first second-pass item
};

struct Schedule {
  Family family = any_family;
  int32_t item_elements = 0;
  std::vector<DeviceLayer> layers;
  std::vector<Item> items;
  int32_t slots = 0, segments = 0;
  std::vector<int32_t> tensor_layers;  // by tensor
  std::vector<int32_t> first_layer;    // of each tensor in it, and the end
};

/// Schedule of a plan whose tensors, spans and layers are set. `measured`: layers have sums.
Schedule make_schedule(const Plan& plan, bool measured, const DeviceInfo& device,
                       const Tuning& tuning);

/// What a step may change, as the device sees it.
struct StepTables {
  DeviceSpan* spans;
  DeviceCount* counts;       // one a tensor
  DevicePresence* presence;  // one a layer
  double** memory;           // one a layer
};

/// Fill them from a plan whose tensors have been looked up.
void fill_tables(const StepTables& to, const Plan& plan, const Schedule& schedule);

}  // namespace layerlr
