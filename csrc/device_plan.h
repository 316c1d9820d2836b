// A plan whose tables lie in a GPU's memory.
#pragma once

#include <map>

#include "bound_plan.h"
#include "cuda/schedule.h"

namespace layerlr {

class DevicePlan : public BoundPlan {
 public:
  /// `engine` runs the kernels and outlives the plan; `tuning` is what results do not depend on.
  DevicePlan(const PlanSpec& spec, const Engine& engine, Tuning tuning);

  /// Numbers of the config, by place, that are tensors on the device: they are read there, and
  /// nobody waits.
  using OnDevice = std::map<int, at::Tensor>;

  void step(const StepConfig& config, const OnDevice& on_device);

  /// The same in two halves: the sums of each layer [layers, 4], and what follows from them.
  at::Tensor measure(const StepConfig& config, const OnDevice& on_device);
  void apply(const StepConfig& config, const OnDevice& on_device, const at::Tensor& sums);

  /// g.g of each layer [layers], before L2 decay.
  at::Tensor norms(const StepConfig& config, const OnDevice& on_device);

  /// Bring the numbers to the device, for steps that have been captured.
  void refresh(const StepConfig& config, const OnDevice& on_device);

  /// Bytes of device memory that the plan keeps.
  int64_t memory() const { return fixed_.nbytes() + scratch_.nbytes() + fresh_.nbytes(); }

 private:
  bool ready(const StepConfig& config, const OnDevice& on_device);
  at::Tensor no_sums();
  void build(bool measured);
  void fill_config(const StepConfig& config, const OnDevice& on_device);
  void copy(const OnDevice& on_device);
  void hold_for(const std::optional<c10::Stream>& now);
  void upload(void* stream);
  void upload(size_t begin, size_t end, bool all, void* stream);
  std::optional<c10::Stream> current_stream() const;
  void* stream() const;
  void check(const char* error) const;

  const Engine& engine_;
  Tuning tuning_;
  DeviceInfo info_;
  std::optional<bool> measured_;  // what the schedule was made for
  Schedule schedule_;
  StepArgs args_{};
  at::Tensor fixed_, scratch_, fresh_;   // bytes: tables, sums and counters, what steps may change
  at::Tensor layer_sums_;                // in scratch_
  std::vector<char> now_, there_;        // fresh_ as it should be, and as it is, unless:
  std::optional<c10::Stream> built_on_;  // none: the host
  bool unknown_ = true;
  bool captured_ = false;  // graphs write there whenever they run
  size_t spans_at_ = 0, counts_at_ = 0, presence_at_ = 0, memory_at_ = 0;
};

}  // namespace layerlr
