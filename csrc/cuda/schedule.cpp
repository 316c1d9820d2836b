#include "cuda/schedule.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace layerlr {
namespace {

/// Shared memory that is not for tiles: Shared<D>, and what the driver keeps.
constexpr int reserved_bytes = 2048;

/// Bytes of the largest tile of an array; 16 more let it lie off the border as it does in memory.
int place_bytes(const Plan& plan, int threads, bool state) {
  int most = 0;
  for (const TensorRow& row : plan.tensors) {
    const int each = state ? state_bytes(row.dtype) : param_bytes(row.dtype);
    most = std::max(most, each * tile_elements(row.dtype, threads));
  }
  return most + 16;
}

/// Update rules hold w and u, and let go of the rest when it is measured; gradient rules hold all.
/// u takes the place of g where an element of both has the same size.
Rings make_rings(const Plan& plan, int threads) {
  const int states = states_of(plan.direction);
  const int param = place_bytes(plan, threads, false), state = place_bytes(plan, threads, true);
  Rings r{};
  const auto put = [&](int k, int ring, int bytes) {
    r.ring[k] = ring;
    r.offset[k] = r.bytes[ring];
    r.bytes[ring] += bytes;
  };
  put(0, 0, param);
  r.u_offset = r.bytes[0];
  r.u_is_g = plan.rule.update;
  for (const TensorRow& row : plan.tensors) {
    r.u_is_g = r.u_is_g && param_bytes(row.dtype) == state_bytes(row.dtype);
  }
  if (plan.rule.update && !r.u_is_g) r.bytes[0] += state;
  put(1, plan.rule.update && !r.u_is_g, param);
  for (int k = 0; k < states; ++k) put(2 + k, plan.rule.update, state);
  return r;
}

/// Give the rings as many places as there is room for. What is read again must have been written
/// before, and is asked for `ahead` tiles early: so many can be held at least.
void fill_rings(Schedule& s, int room) {
  Rings& r = s.rings;
  const int each = r.bytes[0] + static_cast<int>(sizeof(Job));
  for (s.ahead = tiles_ahead; s.ahead > 0; --s.ahead) {
    r.places[1] = r.bytes[1] ? s.ahead + 1 : 1;
    r.places[0] = (room - r.bytes[1] * r.places[1]) / each;
    s.lag = r.places[0] - s.ahead;
    if (s.lag >= s.ahead) return;
  }
  throw std::invalid_argument("tiles of this direction and dtype do not fit into the device's " +
                              std::to_string(room) + " bytes of shared memory");
}

/// A tile of a layer, while runs are made.
struct Tile {
  int32_t span, segment;
  int64_t begin;
  int64_t number;
};

class Maker {
 public:
  Maker(const Plan& plan, bool measured, int threads, Schedule& s, int hold)
      : plan_(plan), measured_(measured), threads_(threads), s_(s), hold_(hold), lists_(s.blocks) {
    spans_.resize(plan.layers.size());
    for (size_t i = 0; i < plan.spans.size(); ++i) {
      spans_[plan.spans[i].layer].push_back(static_cast<int32_t>(i));
    }
  }

  void run() {
    for (size_t l = 0; l < plan_.layers.size(); ++l) layer(static_cast<int32_t>(l));
    s_.first_run.push_back(0);
    for (const std::vector<Run>& list : lists_) {
      s_.runs.insert(s_.runs.end(), list.begin(), list.end());
      s_.first_run.push_back(static_cast<int32_t>(s_.runs.size()));
    }
  }

 private:
  int64_t each(const Span& span) const {
    return tile_elements(plan_.tensors[span.tensor].dtype, threads_);
  }

  /// Tiles are dealt to the blocks in turn, each layer going on where the last one ended.
  void layer(int32_t l) {
    std::vector<Tile> tiles;
    for (const int32_t i : spans_[l]) {
      const Span& span = plan_.spans[i];
      int64_t begin = span.begin;
      do {  // an empty tensor has an empty tile: it takes part all the same
        tiles.push_back({i, 0, begin, s_.tiles + static_cast<int64_t>(tiles.size())});
        begin += each(span);
      } while (begin < span.end);
    }
    const int64_t n = static_cast<int64_t>(tiles.size());
    const int32_t first_segment = static_cast<int32_t>(s_.segments.size());
    const int64_t most = segment_tiles * threads_;
    for (int64_t first = 0; first < n; first += most) {
      const int64_t count = std::min(most, n - first);
      for (int64_t j = first; j < first + count; ++j) {
        tiles[j].segment = static_cast<int32_t>(s_.segments.size());
      }
      s_.segments.push_back({s_.tiles + first, static_cast<int32_t>(count), l,
                             static_cast<int32_t>(std::min<int64_t>(count, s_.blocks))});
    }
    const Layer& layer = plan_.layers[l];
    s_.layers.push_back({layer.lr_scale, layer.ruled, first_segment,
                         static_cast<int32_t>(s_.segments.size()) - first_segment});
    for (int64_t j = 0; j < std::min<int64_t>(n, s_.blocks); ++j) {
      std::vector<Tile> own;
      for (int64_t k = j; k < n; k += s_.blocks) own.push_back(tiles[k]);
      deal(own, lists_[(s_.tiles + j) % s_.blocks]);
    }
    s_.tiles += n;
  }

  /// One block's tiles of a layer: the first ones are streamed, the last ones held; those that were
  /// streamed come again, last one first.
  void deal(const std::vector<Tile>& own, std::vector<Run>& list) {
    const size_t start = list.size(), n = own.size();
    if (!measured_) {
      for (const Tile& tile : own) add(list, start, tile, again);
      return;
    }
    const size_t streamed = n - std::min<size_t>(n, hold_);
    for (size_t i = 0; i < n; ++i) {
      add(list, start, own[i], i < streamed ? stream : hold);
      if (i + 1 == n || own[i + 1].segment != own[i].segment) list.back().measured = 1;
    }
    for (size_t i = streamed; i-- > 0;) add(list, start, own[i], again);
    if (plan_.rule.update) return;
    for (size_t i = list.size(); i-- > start;) {  // the last of each segment to be applied
      if (list[i].kind == stream) continue;
      bool later = false;
      for (size_t k = i + 1; k < list.size(); ++k) {
        later |= list[k].kind != stream && list[k].segment == list[i].segment;
      }
      list[i].applied = !later;
    }
  }

  /// Add a tile to the last run where it fits there.
  void add(std::vector<Run>& list, size_t start, const Tile& tile, Kind kind) {
    const Span& span = plan_.spans[tile.span];
    if (list.size() > start) {
      Run& last = list.back();
      const int64_t stride = tile.number - (last.tile + int64_t(last.count - 1) * last.stride);
      if (last.kind == kind && last.segment == tile.segment && last.tensor == span.tensor &&
          last.end == span.end && !last.measured && (last.count == 1 || last.stride == stride)) {
        last.stride = static_cast<int32_t>(stride);
        ++last.count;
        return;
      }
    }
    const int8_t ruled = plan_.layers[span.layer].ruled;
    list.push_back({tile.begin, span.end, tile.number, span.tensor, span.layer, tile.segment, 1, 0,
                    kind, ruled, 0, 0});
  }

  const Plan& plan_;
  const bool measured_;
  const int threads_;
  Schedule& s_;
  const int hold_;
  std::vector<std::vector<int32_t>> spans_;
  std::vector<std::vector<Run>> lists_;
};

}  // namespace

Schedule make_schedule(const Plan& plan, bool measured, const DeviceInfo& device,
                       const Tuning& tuning) {
  Schedule s;
  s.rings = make_rings(plan, device.tile_threads);
  fill_rings(s, device.shared_bytes - reserved_bytes);
  s.blocks = tuning.blocks ? tuning.blocks : device.multiprocessors;
  s.plain = tuning.plain || !device.cooperative;
  int hold = std::min(s.lag, std::max(s.lag - spare_tiles, s.ahead));
  if (tuning.hold) hold = std::min(std::max(tuning.hold, s.ahead), s.lag);
  if (s.plain) hold = 0;
  Maker(plan, measured, device.tile_threads, s, hold).run();
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
