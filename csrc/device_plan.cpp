#include "device_plan.h"

#include <ATen/Functions.h>
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

DevicePlan::DevicePlan(const LivePlan& live, const Engine* engine, Tuning tuning)
    : LivePlan(live), engine_(engine), tuning_(tuning) {
  check(engine_->info(device().index(), &info_));
}

void DevicePlan::check(const char* error) const {
  TORCH_CHECK(!error, "layerlr on ", device(), ": ", error);
}

void* DevicePlan::stream() const {
  if (device().is_cpu()) return nullptr;  // kernels that run on the host, in tests
  return c10::impl::VirtualGuardImpl(device().type()).getStream(device()).native_handle();
}

void DevicePlan::build(bool measured) {
  const Plan& p = plan();
  schedule_ = make_schedule(p, measured, info_, tuning_);
  const Schedule& s = schedule_;
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  const auto there = bytes.device(device());

  Layout fixed;
  const size_t layers = fixed.put(s.layers), segments = fixed.put(s.segments),
               runs = fixed.put(s.runs), first_run = fixed.put(s.first_run),
               tensor_layers = fixed.put(s.tensor_layers);
  const at::Tensor host = at::zeros({int64_t(fixed.bytes)}, bytes);
  const auto fill = [&](const auto& v, size_t at) {
    std::copy(v.begin(), v.end(), at_byte<std::decay_t<decltype(v[0])>>(host, at));
  };
  fill(s.layers, layers);
  fill(s.segments, segments);
  fill(s.runs, runs);
  fill(s.first_run, first_run);
  fill(s.tensor_layers, tensor_layers);
  fixed_ = host.to(there);

  const size_t n_layers = s.layers.size(), n_segments = s.segments.size();
  Layout scratch;
  const size_t tile_sums = scratch.put(s.tiles * sizeof(LayerStats)),
               segment_sums = scratch.put(n_segments * sizeof(LayerStats)),
               layer_sums = scratch.put(n_layers * sizeof(LayerStats)),
               verdicts = scratch.put(n_layers * sizeof(DeviceVerdict)),
               segment_arrivals = scratch.put(n_segments * 4),
               layer_arrivals = scratch.put(n_layers * 4), ready = scratch.put(n_layers * 4),
               sync = scratch.put(sizeof(DeviceSync));
  scratch_ = at::zeros({int64_t(scratch.bytes)}, there);
  layer_sums_ = scratch_.narrow(0, layer_sums, n_layers * sizeof(LayerStats))
                    .view(at::kDouble)
                    .view({int64_t(n_layers), 4});

  Layout fresh;
  const size_t config = fresh.put(sizeof(DeviceConfig));
  grads_at_ = fresh.put(p.tensors.size() * sizeof(void*));
  presence_at_ = fresh.put(n_layers * sizeof(DevicePresence));
  kept_at_ = fresh.put(n_layers * sizeof(double*));
  rows_at_ = fresh.put(p.tensors.size() * sizeof(DeviceRow));
  fresh_ = at::empty({int64_t(fresh.bytes)}, there);
  now_.assign(fresh.bytes, 0);
  there_.assign(fresh.bytes, 0);
  unknown_ = true;

  args_.direction = p.direction;
  args_.rule = p.rule;
  args_.measured = measured;
  args_.tensors = static_cast<int32_t>(p.tensors.size());
  args_.layers = static_cast<int32_t>(n_layers);
  args_.blocks = s.blocks;
  args_.ahead = s.ahead;
  args_.lag = s.lag;
  args_.rings = s.rings;
  args_.config = at_byte<DeviceConfig>(fresh_, config);
  args_.grads = at_byte<const char*>(fresh_, grads_at_);
  args_.presence = at_byte<DevicePresence>(fresh_, presence_at_);
  args_.kept = at_byte<double*>(fresh_, kept_at_);
  args_.rows = at_byte<DeviceRow>(fresh_, rows_at_);
  args_.layer = at_byte<DeviceLayer>(fixed_, layers);
  args_.segment = at_byte<Segment>(fixed_, segments);
  args_.runs = at_byte<Run>(fixed_, runs);
  args_.first_run = at_byte<int32_t>(fixed_, first_run);
  args_.tensor_layers = at_byte<int32_t>(fixed_, tensor_layers);
  args_.tile_sums = at_byte<LayerStats>(scratch_, tile_sums);
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
  std::copy(std::begin(config.rule), std::end(config.rule), args_.rule.hyper);
}

void DevicePlan::fill_rows() {
  const Plan& p = plan();
  auto* grads = reinterpret_cast<const char**>(now_.data() + grads_at_);
  auto* rows = reinterpret_cast<DeviceRow*>(now_.data() + rows_at_);
  for (size_t i = 0; i < p.tensors.size(); ++i) {
    const TensorRow& from = p.tensors[i];
    grads[i] = from.active ? static_cast<const char*>(from.grad) : nullptr;
    if (!from.active) continue;  // its pointers may be stale
    DeviceRow& row = rows[i];
    row.param = static_cast<char*>(from.param);
    for (int k = 0; k < max_states; ++k) row.state[k] = static_cast<char*>(from.state[k]);
    row.step = from.step;
    row.dtype = static_cast<int32_t>(from.dtype);
    row.step_is_double = from.step_is_double;
    row.held = from.held;
    row.extra = static_cast<char*>(from.extra);
    row.seed = from.seed;
    row.first_layer = schedule_.first_layer[i];
    row.layers = schedule_.first_layer[i + 1] - schedule_.first_layer[i];
  }
  auto* presence = reinterpret_cast<DevicePresence*>(now_.data() + presence_at_);
  auto* kept = reinterpret_cast<double**>(now_.data() + kept_at_);
  for (size_t l = 0; l < p.layers.size(); ++l) {
    presence[l] = {-1, 1};
    kept[l] = p.layers[l].memory;
  }
  for (const Span& span : p.spans) {
    DevicePresence& layer = presence[span.layer];
    if (!p.tensors[span.tensor].active) {
      layer.whole = 0;
    } else if (layer.first < 0) {
      layer.first = span.tensor;
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
    check(engine_->upload(to + first, &now_[first], n, device().index(), stream));
    std::memcpy(&there_[first], &now_[first], n);
  }
}

/// A graph brings its own pointers along, as steps outside may put others there in between, but no
/// hyper-parameters: it reads those that are there when it runs.
void DevicePlan::upload(void* stream) {
  const bool graph = engine_->capturing(stream), all = unknown_ || captured_ || graph;
  if (graph) {
    TORCH_CHECK(std::memcmp(now_.data(), there_.data(), grads_at_) == 0,
                "layerlr: hyper-parameters have changed since the last step: call "
                "optimizer.refresh() before the capture, which brings them to the device");
    captured_ = true;
  } else {
    upload(0, grads_at_, all, stream);
  }
  upload(grads_at_, now_.size(), all, stream);
  unknown_ = false;
}

void DevicePlan::copy(const OnDevice& on_device) {
  for (const auto& [place, tensor] : on_device) {
    fresh_.narrow(0, place * sizeof(double), sizeof(double))
        .view(at::kDouble)
        .copy_(tensor.reshape({1}));
  }
}

/// Bring what is on the device up to date; false where there is nothing to step.
bool DevicePlan::ready(const StepConfig& config, const OnDevice& on_device) {
  const auto& tensors = plan().tensors;
  if (std::none_of(tensors.begin(), tensors.end(), [](const TensorRow& t) { return t.active; })) {
    return false;  // every layer has stepped within backward, or there was none
  }
  const bool measured = plan().has_rule || config.skip != 0;
  void* const at = stream();
  if (measured_ != measured) {
    TORCH_CHECK(!engine_->capturing(at),
                "layerlr: a CUDA graph can be captured after a step with the same parameters and "
                "rule: the first one builds the plan; take one before the capture");
    build(measured);
  }
  if (!args_.layers) return false;
  fill_config(config, on_device);
  fill_rows();
  upload(at);
  copy(on_device);
  return true;
}

void DevicePlan::step(const StepConfig& config, const OnDevice& on_device) {
  const c10::DeviceGuard guard(device());
  if (ready(config, on_device)) {
    check(engine_->step(args_, device().index(), schedule_.plain, stream()));
  }
  finish();
}

at::Tensor DevicePlan::measure(const StepConfig& config, const OnDevice& on_device) {
  const c10::DeviceGuard guard(device());
  if (!ready(config, on_device)) return no_sums();
  check(engine_->measure(args_, device().index(), stream()));
  return layer_sums_.clone();
}

void DevicePlan::apply(const StepConfig& config, const OnDevice& on_device,
                       const at::Tensor& sums) {
  const c10::DeviceGuard guard(device());
  if (ready(config, on_device)) {
    layer_sums_.copy_(sums);
    check(engine_->apply(args_, device().index(), stream()));
  }
  finish();
}

at::Tensor DevicePlan::norms(const StepConfig& config, const OnDevice& on_device) {
  const c10::DeviceGuard guard(device());
  if (!ready(config, on_device)) return no_sums().select(1, 0).contiguous();
  StepArgs args = args_;  // whose rule and decay look at the gradients alone
  args.rule = {};
  args.raw = true;
  check(engine_->measure(args, device().index(), stream()));
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
  upload(0, grads_at_, true, stream());
  copy(on_device);
}

}  // namespace layerlr
