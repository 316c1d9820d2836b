// Device time of a step of the CUDA engine alone: no Python, no torch, a second to start.
//   step MODEL.txt DISTANCE,... ROUNDS [CASE]    a line of the model is a tensor: elements, is a
//   kernel
// Prints a line for each case (momentum-layca) and distance: microseconds, and for the first
// distance those of each pass alone. float32; the L2 cache is flushed before each step; medians.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "cuda/engine.cu"
#include "cuda/kernels.cuh"
#include "cuda/schedule.h"

namespace layerlr {
template DirectionKernels kernels_of<Momentum>();
template DirectionKernels kernels_of<Adam>();

namespace bench {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
void check(const char* error) {
  if (!error) return;
  std::printf("engine: %s\n", error);
  std::exit(1);
}

/// Device memory that is given back in the end.
struct Memory {
  std::vector<void*> all;
  ~Memory() {
    for (void* p : all) cudaFree(p);
  }
  template <class T>
  T* zeros(size_t n) {
    T* p;
    check(cudaMalloc(&p, n * sizeof(T) + 16));
    check(cudaMemset(p, 0, n * sizeof(T)));
    all.push_back(p);
    return p;
  }
  template <class T>
  T* copy(const std::vector<T>& v) {
    T* p = zeros<T>(v.size());
    check(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
  }
};

__global__ void fill(float* p, size_t n, unsigned seed) {
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    p[i] = static_cast<int>(fmix32(static_cast<unsigned>(i) + seed)) * 0x1p-37f;
  }
}

struct Case {
  const char* name;
  int direction;
  bool has_rule;
  RuleId rule;
};
const Case cases[] = {
    {"momentum-none", 0, false, RuleId::Plain}, {"momentum-singh", 0, true, RuleId::Singh},
    {"momentum-lars", 0, true, RuleId::Lars},   {"momentum-layca", 0, true, RuleId::Layca},
    {"adam-none", 1, false, RuleId::Plain},     {"adam-singh", 1, true, RuleId::Singh},
    {"adam-layca", 1, true, RuleId::Layca},     {"adam-lamb", 1, true, RuleId::Lamb},
};

/// A plan over tensors that lie one after another, each at a border of 512 bytes.
struct Model {
  Plan plan;
  Memory memory;

  Model(const Case& c, const std::vector<int64_t>& sizes, const std::vector<bool>& kernel) {
    plan.direction = c.direction;
    plan.has_rule = c.has_rule;
    plan.rule.rule = c.rule;
    plan.rule.update = rule_info(c.rule).update;
    const double lamb_clip = 1e30, lars_trust = 1e-3, layca_eps = 1e-6;
    plan.rule.hyper[0] = c.rule == RuleId::Lamb   ? lamb_clip
                         : c.rule == RuleId::Lars ? lars_trust
                                                  : layca_eps;
    size_t padded = 0;
    for (const int64_t n : sizes) padded += (n + 127) / 128 * 128;
    float* arrays[4];  // w, g, two states
    for (int k = 0; k < 4; ++k) {
      arrays[k] = memory.zeros<float>(padded);
      if (k < 3) fill<<<1024, 256>>>(arrays[k], padded, k);
    }
    float* counts = memory.zeros<float>(sizes.size() * 128);
    size_t at = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      Row row;
      row.param.data = arrays[0] + at;
      row.grad.data = arrays[1] + at;
      for (int k = 0; k < 2; ++k) row.state[k].data = arrays[2 + k] + at;
      row.step = counts + 128 * i;
      plan.tensors.push_back(row);
      plan.spans.push_back({int(i), int(i), 0, sizes[i]});
      Layer layer;
      layer.ruled = c.has_rule && (c.rule == RuleId::Singh || kernel[i]);
      plan.layers.push_back(layer);
      at += (sizes[i] + 127) / 128 * 128;
    }
  }
};

StepArgs arguments(const Model& model, const Case& c, const Schedule& s, Memory& memory) {
  const Plan& plan = model.plan;
  const size_t n = plan.layers.size();
  std::vector<DeviceSpan> spans(n);
  std::vector<DeviceCount> counts(n);
  std::vector<DevicePresence> presence(n);
  std::vector<double*> stored(n);
  fill_tables({spans.data(), counts.data(), presence.data(), stored.data()}, plan, s);
  double* numbers = memory.zeros<double>(n);
  for (size_t i = 0; i < n; ++i) stored[i] = numbers + i;
  DeviceConfig config;
  config.lr = 1e-7;
  config.skip = 1;
  const double hyper[] = {0.9, c.direction ? 0.999 : 0, 1e-8, 1, 1};
  std::copy(std::begin(hyper), std::end(hyper), config.direction);
  StepArgs a{};
  a.direction = plan.direction;
  a.family = s.family;
  a.rule = plan.rule;
  a.measured = c.has_rule;
  a.tensors = a.layers = static_cast<int32_t>(n);
  a.items = static_cast<int32_t>(s.items.size());
  a.item_elements = s.item_elements;
  a.config = memory.copy<DeviceConfig>({config});
  a.spans = memory.copy(spans);
  a.counts = memory.copy(counts);
  a.presence = memory.copy(presence);
  a.memory = memory.copy(stored);
  a.layer = memory.copy(s.layers);
  a.item = memory.copy(s.items);
  a.tensor_layers = memory.copy(s.tensor_layers);
  a.slot_sums = memory.zeros<LayerStats>(s.slots);
  a.segment_sums = memory.zeros<LayerStats>(s.segments);
  a.layer_sums = memory.zeros<LayerStats>(n);
  a.segment_arrivals = memory.zeros<uint32_t>(s.segments);
  a.layer_arrivals = memory.zeros<uint32_t>(n);
  a.ready = memory.zeros<uint32_t>(n);
  a.verdicts = memory.zeros<DeviceVerdict>(n);
  a.sync = memory.zeros<DeviceSync>(1);
  a.stats = memory.zeros<double>(n * columns);
  return a;
}

struct Timer {
  static constexpr size_t flushed = size_t(256) << 20;
  Memory memory;
  char* cache = memory.zeros<char>(flushed);
  cudaEvent_t begin, end;
  int rounds;

  explicit Timer(int rounds) : rounds(rounds) {
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
  }
  /// Median, in microseconds, after two rounds to warm up.
  template <class F>
  float operator()(F launch) const {
    std::vector<float> ms;
    for (int i = -2; i < rounds; ++i) {
      float t;
      check(cudaMemsetAsync(cache, i, flushed));
      check(cudaEventRecord(begin));
      check(launch());
      check(cudaEventRecord(end));
      check(cudaEventSynchronize(end));
      check(cudaEventElapsedTime(&t, begin, end));
      if (i >= 0) ms.push_back(t);
    }
    std::sort(ms.begin(), ms.end());
    return ms[ms.size() / 2] * 1e3f;
  }
};

int run(int argc, char** argv) {
  if (argc < 4) return 2;
  std::vector<int64_t> sizes;
  std::vector<bool> kernel;
  std::ifstream file(argv[1]);
  for (int64_t n, k; file >> n >> k;) {
    sizes.push_back(n);
    kernel.push_back(k != 0);
  }
  const Timer time(std::atoi(argv[3]));
  const Engine& engine = cuda_engine();
  DeviceInfo info;
  check(engine.info(0, &info));
  for (const Case& c : cases) {
    if (argc > 4 && std::strcmp(argv[4], c.name) != 0) continue;
    const Model model(c, sizes, kernel);
    bool first = true;
    const std::string list = argv[2];
    for (size_t at = 0; at < list.size(); at = list.find(',', at) + 1) {
      Memory memory;
      const int distance = std::atoi(&list[at]);
      const Schedule s = make_schedule(model.plan, c.has_rule, info, {0, distance});
      const StepArgs a = arguments(model, c, s, memory);
      std::printf("%s %d %.1f", c.name, distance, time([&] { return engine.step(a, 0, nullptr); }));
      if (c.has_rule && first) {
        std::printf(" measure %.1f", time([&] { return engine.measure(a, 0, nullptr); }));
        std::printf(" apply %.1f", time([&] { return engine.apply(a, 0, nullptr); }));
      }
      std::printf("\n");
      std::fflush(stdout);
      first = false;
      if (!c.has_rule || list.find(',', at) == std::string::npos) break;
    }
  }
  return 0;
}

}  // namespace bench
}  // namespace layerlr

int main(int argc, char** argv) { return layerlr::bench::run(argc, argv); }
