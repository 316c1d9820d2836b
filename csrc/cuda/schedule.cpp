#include "cuda/schedule.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <stdexcept>

namespace layerlr {
namespace {

/// Items that each multiprocessor takes while a layer's verdict is made, by default: the blocks'
/// last items of its first pass, those that they have tickets for, and the decision.
constexpr int items_of_a_verdict = 8;

Family family_of(const Plan& plan) {
  const auto all = [&](DType dtype, bool coded) {
    return std::all_of(plan.tensors.begin(), plan.tensors.end(), [&](const TensorRow& row) {
      return row.dtype == dtype && (coded || row.held == Held::nearest);
    });
  };
  return all(DType::f32, false)    ? float32_only
         : all(DType::bf16, false) ? bfloat16_only
         : all(DType::bf16, true)  ? coded_bfloat16_only
                                   : any_dtype;
}

class Maker {
 public:
  Maker(const Plan& plan, Schedule& schedule, int64_t item)
      : plan_(plan), s_(schedule), item_(item) {
    spans_.resize(plan.layers.size());
    for (size_t i = 0; i < plan.spans.size(); ++i) {
      spans_[plan.spans[i].layer].push_back(static_cast<int32_t>(i));
    }
    for (size_t l = 0; l < plan.layers.size(); ++l) add_layer(l);
  }

  /// Every item once.
  void one_pass() {
    for (const size_t l : by_size()) add_pass(l, second_pass, false);
  }

  /// The second pass of a layer comes `distance` items after its first, those of other layers in
  /// between, so that its verdict is there and what it read still in the L2 cache. Of a layer
  /// larger than that the items that were read last come first.
  void two_passes(int distance, int64_t l2_bytes) {
    std::deque<std::pair<size_t, size_t>> waiting;  // layers, and where their first pass ended
    const auto second = [&] {
      const size_t l = waiting.front().first;
      waiting.pop_front();
      add_pass(l, second_pass, bytes(l) > l2_bytes / 2);
    };
    for (const size_t l : by_size()) {
      for (const Item& item : items(l, first_pass)) {
        while (!waiting.empty() && s_.items.size() >= waiting.front().second + distance) second();
        s_.items.push_back(item);
      }
      waiting.push_back({l, s_.items.size()});
    }
    while (!waiting.empty()) second();
  }

 private:
  int64_t items_of(const Span& span) const {  // an empty one takes part all the same
    return std::max<int64_t>(1, (span.end - span.begin + item_ - 1) / item_);
  }

  void add_layer(size_t l) {
    int64_t slots = 0;
    for (const int32_t i : spans_[l]) slots += items_of(plan_.spans[i]);
    if (s_.slots + slots > INT32_MAX / 2) throw std::invalid_argument("too many elements");
    const Layer& layer = plan_.layers[l];
    s_.layers.push_back(
        {layer.lr_scale, layer.ruled, s_.slots, static_cast<int32_t>(slots), s_.segments});
    s_.slots += static_cast<int32_t>(slots);
    s_.segments += static_cast<int32_t>((slots + segment_items - 1) / segment_items);
  }

  /// Layers, large ones first: while the verdicts on the last ones are made there is little to wait
  /// for.
  std::vector<size_t> by_size() const {
    std::vector<size_t> order(plan_.layers.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) {
      return s_.layers[x].slots > s_.layers[y].slots;
    });
    return order;
  }

  std::vector<Item> items(size_t l, Phase pass) const {
    std::vector<Item> items;
    int32_t slot = s_.layers[l].first_slot;
    for (const int32_t i : spans_[l]) {
      const int64_t n = items_of(plan_.spans[i]);
      for (int32_t k = 0; k < n; ++k) items.push_back({i, k, slot++, pass});
    }
    return items;
  }

  void add_pass(size_t l, Phase pass, bool backwards) {
    std::vector<Item> all = items(l, pass);
    if (backwards) std::reverse(all.begin(), all.end());
    s_.items.insert(s_.items.end(), all.begin(), all.end());
  }

  /// What both passes read.
  int64_t bytes(size_t l) const {
    int64_t n = 0;
    for (const int32_t i : spans_[l]) {
      const Span& span = plan_.spans[i];
      const DType dtype = plan_.tensors[span.tensor].dtype;
      n += (span.end - span.begin) * (param_bytes(dtype) + state_bytes(dtype));
    }
    return n;
  }

  const Plan& plan_;
  Schedule& s_;
  const int64_t item_;  // elements
  std::vector<std::vector<int32_t>> spans_;
};

}  // namespace

void fill_span(DeviceSpan& to, const Plan& plan, const Span& span) {
  const TensorRow& row = plan.tensors[span.tensor];
  to.grad = nullptr;
  to.layer = span.layer;
  if (!row.active) return;  // the other pointers may be stale
  const int64_t param = span.begin * param_bytes(row.dtype);
  const int64_t state = span.begin * state_bytes(row.dtype);
  to.param = static_cast<char*>(row.param) + param;
  to.grad = static_cast<const char*>(row.grad) + param;
  for (int k = 0; k < max_states; ++k) {
    to.state[k] = row.state[k] ? static_cast<char*>(row.state[k]) + state : nullptr;
  }
  to.aux = nullptr;
  if (row.extra) {
    to.aux = static_cast<char*>(row.extra) + span.begin * aux_bytes(row.dtype, row.held);
  }
  to.step = row.step;
  to.seed = row.seed;
  to.begin = span.begin;
  to.size = span.end - span.begin;
  to.dtype = static_cast<int32_t>(row.dtype);
  to.step_is_double = row.step_is_double;
  to.held = row.held;
  to.ruled = plan.layers[span.layer].ruled;
}

Schedule make_schedule(const Plan& plan, bool measured, const DeviceInfo& device,
                       const Tuning& tuning) {
  Schedule s;
  s.family = family_of(plan);
  Maker maker(plan, s, device.item_elements);
  const int distance =
      tuning.distance ? tuning.distance : items_of_a_verdict * device.multiprocessors;
  if (measured) {
    maker.two_passes(distance, device.l2_bytes);
  } else {
    maker.one_pass();
  }
  s.first_layer.push_back(0);
  for (size_t i = 0, k = 0; i < plan.tensors.size(); ++i) {  // spans are sorted by tensor
    for (; k < plan.spans.size() && plan.spans[k].tensor == static_cast<int32_t>(i); ++k) {
      s.tensor_layers.push_back(plan.spans[k].layer);
    }
    s.first_layer.push_back(static_cast<int32_t>(s.tensor_layers.size()));
  }
  return s;
}

}  // namespace layerlr
