#include "cuda/schedule.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <stdexcept>

namespace layerlr {
namespace {

/// Items that each multiprocessor takes while a layer's verdict is made, by default: two blocks'
/// last items of its first pass, those that they have tickets for, and a few during the decision.
constexpr int items_of_a_verdict = 6;

Family family_of(const Plan& plan) {
  Family family = plain_family;
  for (const Row& row : plan.tensors) {
    if (row.dtype != DType::f32 && row.dtype != DType::bf16) return any_family;
    if (row.coding != Coding::none) family = coded_family;
  }
  return family;
}

Stored stored(const Array& state) {
  return has_scales(state.codec)          ? Stored::codes
         : state.codec == Codec::bfloat16 ? Stored::bfloat16
                                          : Stored::plain;
}

/// Elements of a span, of a tensor with codes as if its blocks were whole.
int64_t size_of(const Plan& plan, const Span& span) {
  const int64_t elements = span.end - span.begin, block = plan.tensors[span.tensor].block;
  return block == code_block ? elements : elements / block * code_block;
}

class Maker {
 public:
  Maker(const Plan& plan, Schedule& schedule) : plan_(plan), s_(schedule) {
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
  /// between, so that its verdict is there and what it read still in the L2 cache; last one first,
  /// as of a layer larger than that only the items that were read last are.
  void two_passes(int distance) {
    std::deque<std::pair<size_t, size_t>> waiting;  // layers, and where their first pass ended
    const auto second = [&] {
      const size_t l = waiting.front().first;
      waiting.pop_front();
      add_pass(l, second_pass, true);
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
    const int64_t size = size_of(plan_, span);
    return std::max<int64_t>(1, (size + s_.item_elements - 1) / s_.item_elements);
  }

  void add_layer(size_t l) {
    int64_t slots = 0;
    for (const int32_t i : spans_[l]) slots += items_of(plan_.spans[i]);
    if (s_.slots + slots > INT32_MAX / 2) throw std::invalid_argument("too many elements");
    const Layer& layer = plan_.layers[l];
    s_.layers.push_back({layer.lr_scale, layer.start_radius, layer.ruled, s_.slots,
                         static_cast<int32_t>(slots), s_.segments});
    s_.slots += static_cast<int32_t>(slots);
    s_.segments += static_cast<int32_t>((slots + segment_items - 1) / segment_items);
  }

  /// Layers, large ones first: while the verdicts on the last ones are made there is little to wait
  /// for.
  std::vector<size_t> by_size() const {
    std::vector<size_t> order(plan_.layers.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t x, size_t y) { return s_.layers[x].slots > s_.layers[y].slots; });
    return order;
  }

  std::vector<Item> items(size_t l, Phase pass) const {
    std::vector<Item> items;
    uint32_t slot = s_.layers[l].first_slot;
    for (const int32_t i : spans_[l]) {
      const int64_t n = items_of(plan_.spans[i]);
      for (int32_t k = 0; k < n; ++k) {
        items.push_back({i, k, static_cast<int32_t>(l), slot++, pass == second_pass});
      }
    }
    return items;
  }

  void add_pass(size_t l, Phase pass, bool backwards) {
    std::vector<Item> all = items(l, pass);
    if (backwards) std::reverse(all.begin(), all.end());
    s_.items.insert(s_.items.end(), all.begin(), all.end());
  }

  const Plan& plan_;
  Schedule& s_;
  std::vector<std::vector<int32_t>> spans_;
};

}  // namespace

namespace {

void fill_span(DeviceSpan& to, const Plan& plan, const Span& span) {
  const Row& row = plan.tensors[span.tensor];
  to.array[array_g].data = nullptr;
  if (!row.active()) return;  // the other pointers may be stale
  const auto fill = [&](int which, int which_aux, const Array& whole, int plain_bytes) {
    const int block = static_cast<int>(row.block);
    const Array x = whole.from(span.begin, block, plain_bytes, row.dtype);
    const int bytes = stored_bytes(x.codec, plain_bytes);
    to.array[which] = {static_cast<char*>(x.data), block * bytes, std::min(4 * bytes, 16)};
    if (which_aux < 0) return;
    const int beside = static_cast<int>(x.aux_bytes(block, block, row.dtype));
    char* const aux = beside ? static_cast<char*>(x.aux) : nullptr;
    const int each = has_scales(x.codec) ? 1 : beside / block;
    to.array[which_aux] = {aux, beside, has_scales(x.codec) ? 4 : std::min(4 * each, 16)};
  };
  fill(array_w, array_aux, row.param, param_bytes(row.dtype));
  fill(array_g, -1, row.grad, param_bytes(row.dtype));
  for (int k = 0; k < max_states; ++k) {
    fill(array_state + k, array_scales + k, row.state[k], state_bytes(row.dtype));
  }
  const Layer& layer = plan.layers[span.layer];
  to.step = row.step;
  to.lr_scale = layer.lr_scale;
  to.size = size_of(plan, span);
  to.begin = span.begin;
  to.seed = row.seed;
  to.dtype = static_cast<int32_t>(row.dtype);
  to.step_is_double = row.step_is_double;
  to.weights = static_cast<int32_t>(row.param.codec);
  to.states = stored(row.state[0]);
  to.block = static_cast<int32_t>(row.block);
  to.ruled = layer.ruled;
}

}  // namespace

void fill_tables(const StepTables& to, const Plan& plan, const Schedule& schedule) {
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    to.presence[l] = {-1, 1};
    to.memory[l] = plan.layers[l].memory;
  }
  for (size_t i = 0; i < plan.spans.size(); ++i) {
    const Span& span = plan.spans[i];
    const bool active = plan.tensors[span.tensor].active();
    fill_span(to.spans[i], plan, span);
    DevicePresence& layer = to.presence[span.layer];
    layer.whole &= active;
    if (active && layer.first < 0) layer.first = static_cast<int32_t>(i);
  }
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const Row& row = plan.tensors[i];
    const int32_t first = schedule.first_layer[i];
    to.counts[i] = {row.active() ? row.step : nullptr, int32_t(row.step_is_double), first,
                    schedule.first_layer[i + 1] - first, 0};
  }
}

Schedule make_schedule(const Plan& plan, bool measured, const DeviceInfo& device,
                       const Tuning& tuning) {
  Schedule s;
  s.family = family_of(plan);
  s.item_elements = item_tiles(measured) * device.tile_elements;
  Maker maker(plan, s);
  const int distance =
      tuning.distance ? tuning.distance : items_of_a_verdict * device.multiprocessors;
  if (measured) {
    maker.two_passes(distance);
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
