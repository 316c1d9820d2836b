// Runs the CUDA engine's kernels on the CPU (tests/simt) over rules, dtypes and options, for the
// sanitizers: tensors at the very ends of their allocations and off alignment, tables of exactly
// their size. Exits with 1 where the schedule, or the order in which blocks and threads run,
// changes a bit, or where the CPU engine says otherwise.
//   cuda_driver [n [i]]: every n-th case, from number i on
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/engine.h"
#include "cuda/schedule.h"
#include "model.h"
#include "simt.h"

namespace layerlr {
const Engine& cuda_engine();
}

using namespace layerlr;

namespace {

/// Elements of an item where something is measured.
constexpr int64_t item = item_tiles(true) * tile_elements;

constexpr int all_dtypes = 4, nearest_bf16 = 5;

struct Case {
  int direction, rule;
  int dtype;  // or one of the two above: bfloat16 alone, with nothing beside it
  bool options;
  bool few = false;  // one item a tensor; else up to eleven, of one segment or more
};

/// How a step is run: results are the same for all.
struct Variant {
  Tuning tuning;
  unsigned seed;
  bool halves = false;  // in turn with a step as it is
};

std::vector<Shape> shapes_of(const Case& c) {
  const int64_t part = c.few ? 1 : item;
  std::vector<Shape> shapes;
  for (const int64_t size : {int64_t(15), int64_t(1), 10 * part + 3, part, int64_t(1000),
                             3 * part + 17, int64_t(0), 6 * part - 3}) {
    const int i = static_cast<int>(shapes.size());
    shapes.push_back({size, c.dtype == nearest_bf16
                                ? DType::bf16
                                : static_cast<DType>(c.dtype == all_dtypes ? i % 4 : c.dtype)});
  }
  return shapes;
}

Model make(const Case& c) {
  const bool plain = c.dtype == nearest_bf16 || (c.dtype == int(DType::f32) && !c.options);
  return Model(c.direction, c.rule, shapes_of(c), !plain);
}

/// What is not as in the step before. Options: a gradient that is not finite, so that a layer is
/// skipped, and a tensor without one; another of each from the second step on.
void change(Model& m, const Case& c, int step) {
  if (!c.options || step > 1) return;
  Row& row = m.plan.tensors[step == 0 ? 4 : 5];
  for (Buffer& b : m.buffers) {
    if (b.data == row.grad.data) b.set(b.numel() - 1, NAN);
  }
  m.plan.tensors[step == 0 ? 1 : 2].grad.data = nullptr;
}

/// Of the last step but one nothing may show.
StepConfig config_of(const Model& m, const Case& c, int step) {
  StepConfig config = m.config();
  config.lr = 0.01 * (1 + step);
  (c.options != (step == 3) ? config.decoupled_decay : config.l2) = 0.1;
  config.skip = c.options;
  config.grad_factor = c.options ? -1 : 1;
  config.found_inf = step == 2;
  const double hyper[] = {0.9 - 0.1 * step, 0.99, 1e-8, 1, 1};
  std::copy(std::begin(hyper), std::end(hyper), config.direction);
  return config;
}
constexpr int steps = 4;

void serial(int64_t n, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }

/// A few units in the last place.
bool close(double x, double y, DType dtype) {
  const double epsilon[] = {1e-6, 1e-14, 8e-3, 1e-3};
  if (x == y || (x != x && y != y)) return true;
  return std::abs(x - y) <= epsilon[static_cast<int>(dtype)] * std::max(1.0, std::abs(x));
}

/// The tables of a plan, each in a buffer of its own and of exactly its size.
struct Tables {
  Plan& plan;
  Schedule schedule;
  DeviceConfig config{};
  std::vector<DeviceSpan> spans;
  std::vector<DeviceCount> counts;
  std::vector<DevicePresence> presence;
  std::vector<double*> stored;
  std::vector<LayerStats> slot_sums, segment_sums, layer_sums;
  std::vector<uint32_t> segment_arrivals, layer_arrivals, ready;
  std::vector<DeviceVerdict> verdicts;
  DeviceSync sync{};
  StepArgs args{};

  Tables(Plan& p, bool measured, const Tuning& tuning)
      : plan(p),
        schedule(make_schedule(p, measured, {4, tile_elements}, tuning)),
        spans(p.spans.size()),
        counts(p.tensors.size()),
        presence(p.layers.size()),
        stored(p.layers.size()),
        slot_sums(schedule.slots),
        segment_sums(schedule.segments),
        layer_sums(p.layers.size()),
        segment_arrivals(schedule.segments),
        layer_arrivals(p.layers.size()),
        ready(p.layers.size()),
        verdicts(p.layers.size()) {
    const auto shrink = [](auto&... v) { (v.shrink_to_fit(), ...); };
    shrink(schedule.layers, schedule.items, schedule.tensor_layers, stored);
    args.direction = p.direction;
    args.family = schedule.family;
    args.rule = p.rule;
    args.measured = measured;
    args.tensors = static_cast<int32_t>(p.tensors.size());
    args.layers = static_cast<int32_t>(p.layers.size());
    args.items = static_cast<int32_t>(schedule.items.size());
    args.item_elements = schedule.item_elements;
    args.blocks = tuning.blocks;
    args.config = &config;
    args.spans = spans.data();
    args.counts = counts.data();
    args.presence = presence.data();
    args.memory = stored.data();
    args.layer = schedule.layers.data();
    args.item = schedule.items.data();
    args.tensor_layers = schedule.tensor_layers.data();
    args.slot_sums = slot_sums.data();
    args.segment_sums = segment_sums.data();
    args.layer_sums = layer_sums.data();
    args.segment_arrivals = segment_arrivals.data();
    args.layer_arrivals = layer_arrivals.data();
    args.ready = ready.data();
    args.verdicts = verdicts.data();
    args.sync = &sync;
    args.stats = p.stats;
  }

  void step(const StepConfig& c) {
    fill(c);
    cuda_engine().step(args, 0, nullptr);
  }

  /// The same in two launches, after one that measures gradients alone: false where that is wrong.
  bool step_in_halves(const StepConfig& c) {
    fill(c);
    StepArgs gradients = args;
    gradients.rule = {};
    gradients.raw = true;
    cuda_engine().measure(gradients, 0, nullptr);
    bool right = true;
    if (c.found_inf == 0) {
      std::vector<double> sums(plan.layers.size());
      norms(plan, c, {1, serial}, sums.data());
      for (size_t l = 0; l < sums.size(); ++l) {
        right = right && close(layer_sums[l].gg, sums[l], DType::f64);
      }
    }
    cuda_engine().measure(args, 0, nullptr);
    cuda_engine().apply(args, 0, nullptr);
    return right;
  }

 private:
  void fill(const StepConfig& c) {
    config = c;
    fill_tables({spans.data(), counts.data(), presence.data(), stored.data()}, plan, schedule);
  }
};

/// The model after all steps, and whether what was measured alone was right.
std::pair<Model, bool> on_gpu(const Case& c, const Variant& how) {
  Model m = make(c);
  Tables tables(m.plan, m.plan.has_rule || c.options, how.tuning);
  simt::seed = how.seed;
  bool right = true;
  for (int i = 0; i < steps; ++i) {
    change(m, c, i);
    if (how.halves && i != 1) {
      right = tables.step_in_halves(config_of(m, c, i)) && right;
    } else {
      tables.step(config_of(m, c, i));
    }
  }
  return {std::move(m), right};
}

Model on_cpu(const Case& c) {
  Model m = make(c);
  for (int i = 0; i < steps; ++i) {
    change(m, c, i);
    const StepConfig config = config_of(m, c, i);
    if (config.found_inf == 0) step(m.plan, config, {1, serial});
  }
  return m;
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

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const int directions = static_cast<int>(direction_names().size());
  for (int d = 0; d < directions; ++d) {
    for (int rule = -1; rule < rule_count; ++rule) {
      for (int dtype = 0; dtype <= nearest_bf16; ++dtype) {
        for (const bool options : {false, true}) cases.push_back({d, rule, dtype, options});
      }
      cases.push_back({d, rule, 0, false, true});
    }
  }
  return cases;
}

bool run(const Case& c) {
  const auto wrong = [&](const char* what) {
    std::printf("WRONG: %s: direction %d rule %d dtype %d options %d few %d\n", what, c.direction,
                c.rule, c.dtype, c.options, c.few);
    return false;
  };
  const Variant variants[] = {{{2, 0}, 1},    {{13, 0}, 2}, {{5, 1}, 3},      {{3, 2}, 4},
                              {{3, 1000}, 5}, {{0, 10}, 6}, {{3, 0}, 7, true}};
  const Model one = on_gpu(c, {{1, 0}, 0}).first;
  if (!agree(one, on_cpu(c))) return wrong("the CPU engine says otherwise");
  for (const Variant& how : variants) {
    const auto [other, right] = on_gpu(c, how);
    if (!right) return wrong("norms of gradients");
    if (other.bits() != one.bits()) {
      std::printf("%d blocks, distance %d, halves %d, seed %u\n", how.tuning.blocks,
                  how.tuning.distance, how.halves, how.seed);
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
