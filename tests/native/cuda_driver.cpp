// Runs the CUDA engine's kernels on the CPU (tests/simt) over rules, dtypes and options, for the
// sanitizers: tensors at the very ends of their allocations and off alignment, tables and shared
// memory of exactly their size. Exits with 1 where the schedule, or the order in which blocks and
// threads run, changes a bit, or where the CPU engine says otherwise.
//   cuda_driver [n [i]]: every n-th case, from number i on
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "cpu/engine.h"
#include "cuda/schedule.h"
#include "model.h"
#include "simt.h"

namespace layerlr {
const Engine& cuda_engine();
}

using namespace layerlr;

namespace {

constexpr int tile = tile_elements(DType::f32);

/// Tiles in all: 12; 62; a layer of two segments.
enum Size { few, usual, many };

struct Case {
  int direction, rule;
  int dtype;  // 4: all of them
  bool options;
  Size size = usual;
};

/// How a step is run: results are the same for all.
struct Variant {
  Tuning tuning;
  int shared_bytes;
  unsigned seed;
  bool halves = false;  // in turn with a step as it is
};

std::vector<Shape> shapes_of(const Case& c) {
  const int64_t part = c.size == few ? 1 : tile;
  const int64_t last = c.size == many ? segment_tiles * tile_threads + 7 : 40;
  std::vector<Shape> shapes;
  for (const int64_t size : {int64_t(15), int64_t(1), part, 3 * part + 17, int64_t(1000),
                             10 * part + 3, int64_t(0), last * part - 1}) {
    const int dtype = c.dtype < 4 ? c.dtype : static_cast<int>(shapes.size() % 4);
    shapes.push_back({size, static_cast<DType>(dtype)});
  }
  return shapes;
}

/// Options: skip layers 4 and 5, whose gradients are not finite; tensors 1 and 2 have none.
Model make(const Case& c) {
  Model m(c.direction, c.rule, shapes_of(c));
  if (!c.options) return m;
  for (Buffer& b : m.buffers) {
    for (const int i : {4, 5}) {
      if (b.data == m.plan.tensors[i].grad) b.set(b.numel() - 1, NAN);
    }
  }
  m.plan.tensors[1].active = m.plan.tensors[2].active = false;
  return m;
}

StepConfig config_of(const Model& m, const Case& c, int step) {
  StepConfig config = m.config();
  config.lr = 0.01 * (1 + step);
  (c.options ? config.decoupled_decay : config.l2) = 0.1;
  config.skip = c.options;
  config.grad_factor = c.options ? -1 : 1;
  const double hyper[] = {0.9, 0.99, 1e-8, 1, 1};
  std::copy(std::begin(hyper), std::end(hyper), config.direction);
  return config;
}

/// The tables of a plan, each in a buffer of its own and of exactly its size.
struct Tables {
  Schedule schedule;
  DeviceConfig config{};
  std::vector<const char*> grads;
  std::vector<DevicePresence> presence;
  std::vector<double*> radii;
  std::vector<DeviceRow> rows;
  std::vector<LayerStats> tile_sums, segment_sums, layer_sums;
  std::vector<uint32_t> segment_arrivals, layer_arrivals, ready;
  std::vector<DeviceVerdict> verdicts;
  DeviceSync sync{};
  StepArgs args{};

  Tables(const Plan& p, bool measured, const Variant& how)
      : schedule(make_schedule(p, measured, {4, tile_threads, how.shared_bytes, true}, how.tuning)),
        grads(p.tensors.size()),
        presence(p.layers.size(), DevicePresence{-1, 1}),
        rows(p.tensors.size()),
        tile_sums(schedule.tiles),
        segment_sums(schedule.segments.size()),
        layer_sums(p.layers.size()),
        segment_arrivals(schedule.segments.size()),
        layer_arrivals(p.layers.size()),
        ready(p.layers.size()),
        verdicts(p.layers.size()) {
    for (size_t i = 0; i < p.tensors.size(); ++i) {
      const TensorRow& from = p.tensors[i];
      if (!from.active) continue;
      grads[i] = static_cast<const char*>(from.grad);
      rows[i] = {static_cast<char*>(from.param),
                 {},
                 from.step,
                 static_cast<int32_t>(from.dtype),
                 from.step_is_double,
                 schedule.first_layer[i],
                 schedule.first_layer[i + 1] - schedule.first_layer[i],
                 from.held,
                 static_cast<char*>(from.extra),
                 from.seed};
      for (int k = 0; k < max_states; ++k) rows[i].state[k] = static_cast<char*>(from.state[k]);
    }
    for (const Layer& layer : p.layers) radii.push_back(layer.memory);
    for (const Span& span : p.spans) {
      DevicePresence& layer = presence[span.layer];
      const bool active = p.tensors[span.tensor].active;
      layer.whole &= active;
      if (active && layer.first < 0) layer.first = span.tensor;
    }
    const auto shrink = [](auto&... v) { (v.shrink_to_fit(), ...); };
    shrink(schedule.layers, schedule.segments, schedule.runs, schedule.first_run,
           schedule.tensor_layers, radii);
    args.direction = p.direction;
    args.rule = p.rule;
    args.measured = measured;
    args.tensors = static_cast<int32_t>(p.tensors.size());
    args.layers = static_cast<int32_t>(p.layers.size());
    args.blocks = schedule.blocks;
    args.ahead = schedule.ahead;
    args.lag = schedule.lag;
    args.rings = schedule.rings;
    args.config = &config;
    args.grads = grads.data();
    args.presence = presence.data();
    args.kept = radii.data();
    args.rows = rows.data();
    args.layer = schedule.layers.data();
    args.segment = schedule.segments.data();
    args.runs = schedule.runs.data();
    args.first_run = schedule.first_run.data();
    args.tensor_layers = schedule.tensor_layers.data();
    args.tile_sums = tile_sums.data();
    args.segment_sums = segment_sums.data();
    args.layer_sums = layer_sums.data();
    args.segment_arrivals = segment_arrivals.data();
    args.layer_arrivals = layer_arrivals.data();
    args.ready = ready.data();
    args.verdicts = verdicts.data();
    args.sync = &sync;
    args.stats = p.stats;
  }

  void step(const StepConfig& c, bool halves) {
    config = c;
    if (!halves) {
      cuda_engine().step(args, 0, schedule.plain, nullptr);
      return;
    }
    StepArgs norms = args;
    norms.rule = {};
    norms.raw = true;
    for (const StepArgs& first : {norms, args}) cuda_engine().measure(first, 0, nullptr);
    cuda_engine().apply(args, 0, nullptr);
  }
};

constexpr int steps = 3;

Model on_gpu(const Case& c, const Variant& how) {
  Model m = make(c);
  Tables tables(m.plan, m.plan.has_rule || c.options, how);
  simt::seed = how.seed;
  for (int i = 0; i < steps; ++i) tables.step(config_of(m, c, i), how.halves && i != 1);
  return m;
}

Model on_cpu(const Case& c) {
  Model m = make(c);
  const auto serial = [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    body(0, n);
  };
  for (int i = 0; i < steps; ++i) step(m.plan, config_of(m, c, i), {1, serial});
  return m;
}

/// A few units in the last place.
bool close(double x, double y, DType dtype) {
  const double epsilon[] = {1e-6, 1e-14, 8e-3, 1e-3};
  if (x == y || (x != x && y != y)) return true;
  return std::abs(x - y) <= epsilon[static_cast<int>(dtype)] * std::max(1.0, std::abs(x));
}

/// Whether two engines agree; the order of their sums differs, which without a rule nothing shows
/// but the statistics.
bool agree(const Model& m, const Model& n) {
  bool all = true;
  for (size_t i = 0; i < m.buffers.size(); ++i) {
    const Buffer &x = m.buffers[i], &y = n.buffers[i];
    if (std::memcmp(x.data, y.data, x.size) == 0) continue;
    if (!m.plan.has_rule) return false;
    for (int64_t e = 0; e < x.numel(); ++e) all = all && close(x.get(e), y.get(e), x.dtype);
  }
  for (size_t i = 0; i < m.stats.size(); ++i)
    all = all && close(m.stats[i], n.stats[i], DType::f32);
  for (size_t i = 0; i < m.radii.size(); ++i)
    all = all && close(m.radii[i], n.radii[i], DType::f64);
  return all;
}

/// Few tiles and many, then the others.
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const RuleId rule : {RuleId::Singh, RuleId::Layca}) {
    cases.push_back({0, static_cast<int>(rule), 0, false, many});
    cases.push_back({0, static_cast<int>(rule), 0, false, few});
  }
  const int directions = static_cast<int>(direction_names().size());
  for (int d = 0; d < directions; ++d) {
    for (int rule = -1; rule < rule_count; ++rule) {
      for (int dtype = 0; dtype < 5; ++dtype) {
        for (const bool options : {false, true}) cases.push_back({d, rule, dtype, options});
      }
    }
  }
  return cases;
}

/// The least shared memory with which a step is one launch that asks for so many tiles ahead.
int tight(const Case& c, int ahead) {
  const Model m = make(c);
  for (int bytes = 4 << 10;; bytes += 256) {
    try {
      const Schedule s = make_schedule(m.plan, true, {4, tile_threads, bytes, true}, {});
      if (!s.plain && s.ahead == ahead) return bytes;
    } catch (const std::invalid_argument&) {
    }
  }
}

bool run(const Case& c) {
  const auto wrong = [&](const char* what) {
    std::printf("WRONG: %s: direction %d rule %d dtype %d options %d size %d\n", what, c.direction,
                c.rule, c.dtype, c.options, c.size);
    return false;
  };
  const int room = 48 << 10, most = 1000;
  const Variant variants[] = {
      {{2, 0, false}, room, 1},    {{13, 0, false}, room, 2},       {{5, 1, false}, room, 3},
      {{3, most, false}, room, 4}, {{2, 0, false}, tight(c, 1), 5}, {{3, 0, false}, tight(c, 2), 6},
      {{3, 0, true}, room, 7},     {{3, 2, false}, room, 8, true},
  };
  const Model one = on_gpu(c, {{1, 0, false}, room, 0});
  const Model cpu = on_cpu(c);
  if (!agree(one, cpu)) return wrong("the CPU engine says otherwise");
  for (const Variant& how : variants) {
    if (on_gpu(c, how).bits() != one.bits()) {
      std::printf("%d blocks, hold %d, plain %d, halves %d, seed %u\n", how.tuning.blocks,
                  how.tuning.hold, how.tuning.plain, how.halves, how.seed);
      return wrong("bits change");
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const size_t every = argc > 1 ? std::atoi(argv[1]) : 1, from = argc > 2 ? std::atoi(argv[2]) : 0;
  simt::patience_seconds = 1;
  const std::vector<Case> cases = all_cases();
  int runs = 0;
  for (size_t i = from; i < cases.size(); i += every, ++runs) {
    if (!run(cases[i])) return 1;
  }
  std::printf("%d runs\n", runs);
  return 0;
}
