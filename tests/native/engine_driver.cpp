// Runs the CPU engine over every direction, rule, dtype and instruction set, for the sanitizers:
// tensors at the very ends of their allocations and off alignment, one thread and several. Exits
// with 1 where the number of threads changes a bit.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "cpu/engine.h"
#include "cpu/kernels.h"

using namespace layerlr;

namespace {

int bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

/// n elements that end where their allocation ends, so that one read too far is seen; the odd
/// start puts them off every alignment but their own.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  size_t size;
  Buffer(int64_t n, int bytes, bool odd) : size(n * bytes) {
    const size_t shift = odd ? bytes : 0;
    memory.reset(new char[size + shift]);
    data = memory.get() + shift;
    std::memset(memory.get(), 0, size + shift);
  }
};

void fill(Buffer& b, DType dtype, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < b.size / bytes_of(dtype); ++i) {
    const double x = normal(random);
    const float f = static_cast<float>(x);
    if (dtype == DType::f64) std::memcpy(b.data + 8 * i, &x, 8);
    if (dtype == DType::f32) std::memcpy(b.data + 4 * i, &f, 4);
    if (dtype == DType::bf16) std::memcpy(b.data + 2 * i, reinterpret_cast<const char*>(&f) + 2, 2);
    if (dtype == DType::f16) {
      const uint16_t half = static_cast<uint16_t>(0x3000 | (random() & 0x87ff));
      std::memcpy(b.data + 2 * i, &half, 2);
    }
  }
}

struct Model {
  Plan plan;
  std::vector<Buffer> buffers;
  std::vector<float> counts;
  std::vector<double> stats, radii;

  Model(int direction, int rule, DType dtype, const double* hyper) {
    // the last is shared out between threads; in float32 alone, since sanitizers are slow
    const int64_t large = dtype == DType::f32 ? 8 * chunk_size + 100 : 100;
    const int64_t sizes[] = {1, 15, 16, 17, 1000, chunk_size + 3, 0, large};
    const int n = sizeof sizes / sizeof *sizes;
    std::mt19937 random(7);
    plan.direction = direction;
    plan.has_rule = rule >= 0;
    if (rule >= 0) plan.rule.rule = static_cast<RuleId>(rule);
    plan.rule.update = rule_info(plan.rule.rule).update;
    std::copy(hyper, hyper + max_rule_hyper, plan.rule.hyper);
    counts.assign(n, 0);
    buffers.reserve(16 * n);
    const Kernels& k = kernels_for(direction, dtype);
    for (int i = 0; i < n; ++i) {
      TensorRow row;
      const auto buffer = [&](int bytes) -> Buffer& {
        return buffers.emplace_back(sizes[i], bytes, i % 2 == 1);
      };
      Buffer& w = buffer(bytes_of(dtype));
      Buffer& g = buffer(bytes_of(dtype));
      fill(w, dtype, random);
      fill(g, dtype, random);
      row.param = w.data;
      row.grad = g.data;
      for (int s = 0; s < k.states; ++s) row.state[s] = buffer(k.state_bytes).data;
      row.step = &counts[i];
      row.dtype = dtype;
      row.active = true;
      plan.tensors.push_back(row);
    }
    // tensors 0 and 1 share a layer, tensor 4 is split in two, the last but one is outside
    const int layer_of[] = {0, 0, 1, 2, 3, 5, 6, 7};
    for (int i = 0; i < n; ++i) {
      if (i == 4) {
        plan.spans.push_back({4, 3, 0, 600});
        plan.spans.push_back({4, 4, 600, 1000});
      } else {
        plan.spans.push_back({i, layer_of[i], 0, sizes[i]});
      }
    }
    plan.layers.resize(8);
    radii.assign(8, 0);
    for (int l = 0; l < 8; ++l) {
      plan.layers[l].ruled = rule >= 0 && l != 6;
      plan.layers[l].radius = &radii[l];
    }
    stats.assign(8 * columns, 0);
    plan.stats = stats.data();
    plan.finish();
  }
};

void run(Model& m, int threads, bool skip) {
  StepConfig config;
  config.lr = 0.01;
  config.weight_decay = 0.1;
  config.skip = skip;
  const double hyper[] = {0.9, 0.99, 1e-8, 1, 1};
  std::copy(std::begin(hyper), std::end(hyper), config.direction_hyper);
  const ParallelFor parallel = [&](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] { body(n * t / threads, n * (t + 1) / threads); });
    }
    for (std::thread& thread : pool) thread.join();
  };
  for (int i = 0; i < 2; ++i) step(m.plan, config, threads, parallel);
}

}  // namespace

int main() {
  const double rule_hyper[][max_rule_hyper] = {{}, {}, {1e-3, 1e-8, 0}, {10, 0}, {1e-6}};
  int runs = 0;
  for (const char* set : {"default", "avx2", "avx512"}) {
    if (!use_instruction_set(set)) continue;
    for (int d = 0; d < static_cast<int>(direction_names().size()); ++d) {
      for (int rule = -1; rule < static_cast<int>(rule_names().size()); ++rule) {
        for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
          const double* hyper = rule_hyper[rule < 0 ? 0 : rule];
          Model one(d, rule, dtype, hyper), many(d, rule, dtype, hyper);
          run(one, 1, rule >= 0);
          run(many, 3, rule >= 0);
          ++runs;
          for (size_t i = 0; i < one.buffers.size(); ++i) {
            if (std::memcmp(one.buffers[i].data, many.buffers[i].data, one.buffers[i].size) != 0) {
              std::printf("threads change bits: %s direction %d rule %d\n", set, d, rule);
              return 1;
            }
          }
        }
      }
    }
  }
  std::printf("%d runs\n", runs);
  return 0;
}
