#include "device_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <limits>

namespace layerlr {
namespace {

/// Places of arrays in one block of bytes.
struct Layout {
  size_t bytes = 0;
  size_t put(size_t n) {
    const size_t at = bytes;
    bytes += (n + 15) / 16 * 16;
    return at;
  }
  template <class T>
  size_t put(const std::vector<T>& v) {
    return put(v.size() * sizeof(T));
  }
};

template <class T>
T* at_byte(const at::Tensor& t, size_t at) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + at);
}

/// Bytes compared, and sent, at a time.
constexpr size_t page = 1024;

}  // namespace

DevicePlan::DevicePlan(const PlanSpec& spec, const Engine& engine, Tuning tuning)
    : BoundPlan(spec), engine_(engine), tuning_(tuning) {
  check(engine_.info(device().index(), &info_));
}

void DevicePlan::check(const char* error) const {
  TORCH_CHECK(!error, "layerlr on ", device(), ": ", error);
}

std::optional<c10::Stream> DevicePlan::current_stream() const {
  if (device().is_cpu()) return std::nullopt;  // kernels that run on the host, in tests
  return c10::impl::VirtualGuardImpl(device().type()).getStream(device());
}

void* DevicePlan::stream() const {
  const std::optional<c10::Stream> now = current_stream();
  return now ? now->native_handle() : nullptr;
}

void DevicePlan::build(bool measured) {
  const Plan& p = plan();
  schedule_ = make_schedule(p, measured, info_, tuning_);
  const Schedule& s = schedule_;
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  const auto there = bytes.device(device());

  Layout fixed;
  const size_t layers = fixed.put(s.layers), items = fixed.put(s.items),
               tensor_layers = fixed.put(s.tensor_layers);
  const at::Tensor host = at::zeros({int64_t(fixed.bytes)}, bytes);
  const auto fill = [&](const auto& v, size_t at) {
    std::copy(v.begin(), v.end(), at_byte<std::decay_t<decltype(v[0])>>(host, at));
  };
  fill(s.layers, layers);
  fill(s.items, items);
  fill(s.tensor_layers, tensor_layers);
  fixed_ = host.to(there);

  const size_t n_layers = s.layers.size();
  Layout scratch;
  const size_t slot_sums = scratch.put(s.slots * sizeof(LayerStats)),
               segment_sums = scratch.put(s.segments * sizeof(LayerStats)),
               layer_sums = scratch.put(n_layers * sizeof(LayerStats)),
               verdicts = scratch.put(n_layers * sizeof(DeviceVerdict)),
               segment_arrivals = scratch.put(s.segments * sizeof(uint32_t)),
               layer_arrivals = scratch.put(n_layers * sizeof(uint32_t)),
               ready = scratch.put(n_layers * sizeof(uint32_t)),
               sync = scratch.put(sizeof(DeviceSync));
  scratch_ = at::zeros({int64_t(scratch.bytes)}, there);
  layer_sums_ = scratch_.narrow(0, layer_sums, n_layers * sizeof(LayerStats))
                    .view(at::kDouble)
                    .view({int64_t(n_layers), 4});

  Layout fresh;
  const size_t config = fresh.put(sizeof(DeviceConfig));
  spans_at_ = fresh.put(p.spans.size() * sizeof(DeviceSpan));
  counts_at_ = fresh.put(p.tensors.size() * sizeof(DeviceCount));
  presence_at_ = fresh.put(n_layers * sizeof(DevicePresence));
  memory_at_ = fresh.put(n_layers * sizeof(double*));
  fresh_ = at::empty({int64_t(fresh.bytes)}, there);
  now_.assign(fresh.bytes, 0);
  there_.assign(fresh.bytes, 0);
  unknown_ = true;

  args_.direction = p.direction;
  args_.family = s.family;
  args_.rule = p.rule;
  args_.measured = measured;
  args_.tensors = static_cast<int32_t>(p.tensors.size());
  args_.layers = static_cast<int32_t>(n_layers);
  args_.items = static_cast<int32_t>(s.items.size());
  args_.item_elements = s.item_elements;
  args_.blocks = tuning_.blocks;
  args_.config = at_byte<DeviceConfig>(fresh_, config);
  args_.spans = at_byte<DeviceSpan>(fresh_, spans_at_);
  args_.counts = at_byte<DeviceCount>(fresh_, counts_at_);
  args_.presence = at_byte<DevicePresence>(fresh_, presence_at_);
  args_.memory = at_byte<double*>(fresh_, memory_at_);
  args_.layer = at_byte<DeviceLayer>(fixed_, layers);
  args_.item = at_byte<Item>(fixed_, items);
  args_.tensor_layers = at_byte<int32_t>(fixed_, tensor_layers);
  args_.slot_sums = at_byte<LayerStats>(scratch_, slot_sums);
  args_.segment_sums = at_byte<LayerStats>(scratch_, segment_sums);
  args_.layer_sums = at_byte<LayerStats>(scratch_, layer_sums);
  args_.verdicts = at_byte<DeviceVerdict>(scratch_, verdicts);
  args_.segment_arrivals = at_byte<uint32_t>(scratch_, segment_arrivals);
  args_.layer_arrivals = at_byte<uint32_t>(scratch_, layer_arrivals);
  args_.ready = at_byte<uint32_t>(scratch_, ready);
  args_.sync = at_byte<DeviceSync>(scratch_, sync);
  args_.stats = p.stats;
  measured_ = measured;
}

void DevicePlan::fill_config(const StepConfig& config, const OnDevice& on_device) {
  std::memcpy(now_.data(), &config, sizeof config);
  // what is copied on the device differs from whatever is sent later
  constexpr double elsewhere = -std::numeric_limits<double>::infinity();
  for (const auto& [place, tensor] : on_device) {
    TORCH_CHECK(0 <= place && place < int(sizeof config / sizeof(double)));
    for (std::vector<char>* bytes : {&now_, &there_}) {
      std::memcpy(bytes->data() + place * sizeof(double), &elsewhere, sizeof(double));
    }
  }
}

/// Send the bytes [begin, end) that are not there yet.
void DevicePlan::upload(size_t begin, size_t end, bool all, void* stream) {
  char* to = static_cast<char*>(fresh_.data_ptr());
  const auto differs = [&](size_t at) {
    return all || std::memcmp(&now_[at], &there_[at], std::min(page, end - at)) != 0;
  };
  for (size_t at = begin; at < end;) {
    if (!differs(at)) {
      at += page;
      continue;
    }
    const size_t first = at;
    while (at < end && differs(at)) at += page;
    const size_t n = std::min(at, end) - first;
    check(engine_.upload(to + first, &now_[first], n, device().index(), stream));
    std::memcpy(&there_[first], &now_[first], n);
  }
}

/// A graph brings its own pointers along, as steps outside may put others there in between, but no
/// hyper-parameters: it reads those that are there when it runs.
void DevicePlan::upload(void* stream) {
  const bool graph = engine_.capturing(stream), all = unknown_ || captured_ || graph;
  if (graph) {
    TORCH_CHECK(std::memcmp(now_.data(), there_.data(), spans_at_) == 0,
                "layerlr: hyper-parameters have changed since the last step: call "
                "optimizer.refresh() before the capture, which brings them to the device");
    captured_ = true;
  } else {
    upload(0, spans_at_, all, stream);
  }
  upload(spans_at_, now_.size(), all, stream);
  unknown_ = false;
}

void DevicePlan::copy(const OnDevice& on_device) {
  for (const auto& [place, tensor] : on_device) {
    fresh_.narrow(0, place * sizeof(double), sizeof(double))
        .view(at::kDouble)
        .copy_(tensor.reshape({1}));
  }
}

/// The tables were allocated on the stream of the first step. Where a step runs on another one,
/// their memory must not be used again before that stream is done with it. A graph holds them
/// itself.
void DevicePlan::hold_for(const std::optional<c10::Stream>& now) {
  if (!now || now == built_on_) return;
  for (const at::Tensor* t : {&fixed_, &scratch_, &fresh_}) t->record_stream(*now);
}

/// Bring what is on the device up to date; false where there is nothing to step.
bool DevicePlan::ready(const StepConfig& config, const OnDevice& on_device) {
  const auto& tensors = plan().tensors;
  if (std::none_of(tensors.begin(), tensors.end(), [](const Row& t) { return t.active(); })) {
    return false;  // every layer has stepped within backward, or there was none
  }
  const bool measured = plan().has_rule || config.skip != 0;
  void* const at = stream();
  if (measured_ != measured) {
    TORCH_CHECK(!engine_.capturing(at),
                "layerlr: a CUDA graph can be captured after a step with the same parameters and "
                "rule: the first one builds the plan; take one before the capture");
    build(measured);
    built_on_ = current_stream();
  }
  if (!args_.layers) return false;
  if (!engine_.capturing(at)) hold_for(current_stream());
  fill_config(config, on_device);
  char* const now = now_.data();
  fill_tables({reinterpret_cast<DeviceSpan*>(now + spans_at_),
               reinterpret_cast<DeviceCount*>(now + counts_at_),
               reinterpret_cast<DevicePresence*>(now + presence_at_),
               reinterpret_cast<double**>(now + memory_at_)},
              plan(), schedule_);
  upload(at);
  copy(on_device);
  return true;
}

void DevicePlan::step(const StepConfig& config, const OnDevice& on_device) {
  const Use use(*this);
  const c10::DeviceGuard guard(device());
  if (ready(config, on_device)) {
    check(engine_.step(args_, device().index(), stream()));
  }
  finish();
}

at::Tensor DevicePlan::measure(const StepConfig& config, const OnDevice& on_device) {
  const Use use(*this);
  const c10::DeviceGuard guard(device());
  if (!ready(config, on_device)) return no_sums();
  check(engine_.measure(args_, device().index(), stream()));
  return layer_sums_.clone();
}

void DevicePlan::apply(const StepConfig& config, const OnDevice& on_device,
                       const at::Tensor& sums) {
  const Use use(*this);
  const c10::DeviceGuard guard(device());
  if (ready(config, on_device)) {
    layer_sums_.copy_(sums);
    check(engine_.apply(args_, device().index(), stream()));
  }
  finish();
}

at::Tensor DevicePlan::norms(const StepConfig& config, const OnDevice& on_device) {
  const Use use(*this);
  const c10::DeviceGuard guard(device());
  if (!ready(config, on_device)) return no_sums().select(1, 0).contiguous();
  StepArgs args = args_;  // whose rule and decay look at the gradients alone
  args.rule = {};
  args.raw = true;
  check(engine_.measure(args, device().index(), stream()));
  return layer_sums_.select(1, 1).clone();
}

at::Tensor DevicePlan::no_sums() {
  return at::zeros({int64_t(plan().layers.size()), 4},
                   at::TensorOptions().dtype(at::kDouble).device(device()));
}

void DevicePlan::refresh(const StepConfig& config, const OnDevice& on_device) {
  if (!args_.layers) return;  // there was no step
  const c10::DeviceGuard guard(device());
  fill_config(config, on_device);
  upload(0, spans_at_, true, stream());
  copy(on_device);
}

}  // namespace layerlr
