// Runs the CPU engine over every direction, rule, dtype and instruction set, for the sanitizers:
// tensors at the very ends of their allocations and off alignment, one thread and several. Exits
// with 1 where the number of threads changes a bit.
#include <cstdio>
#include <thread>

#include "cpu/engine.h"
#include "cpu/kernels.h"
#include "model.h"

using namespace layerlr;

namespace {

Model make(int direction, int rule, DType dtype) {
  // the last is shared out between threads; in float32 alone, since sanitizers are slow
  const int64_t large = dtype == DType::f32 ? 8 * chunk_size + 128 : 128;
  std::vector<Shape> shapes;
  for (const int64_t size : {int64_t(1), int64_t(15), int64_t(16), int64_t(17), int64_t(1000),
                             chunk_size + 3, int64_t(0), large}) {
    shapes.push_back({size, dtype});
  }
  return Model(direction, rule, shapes);
}

void run(Model& m, int threads, bool skip) {
  StepConfig config = m.config();
  config.lr = 0.01;
  config.l2 = 0.1;
  config.skip = skip;
  const double hyper[] = {0.9, 0.99, 1e-8, 1, 1};
  std::copy(std::begin(hyper), std::end(hyper), config.direction);
  const ParallelFor parallel = [&](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] { body(n * t / threads, n * (t + 1) / threads); });
    }
    for (std::thread& thread : pool) thread.join();
  };
  for (int i = 0; i < 2; ++i) step(m.plan, config, {threads, parallel});
}

}  // namespace

int main() {
  int runs = 0;
  for (const char* set : {"default", "avx2", "avx512"}) {
    if (!use_instruction_set(set)) continue;
    for (int d = 0; d < static_cast<int>(direction_names().size()); ++d) {
      for (int rule = -1; rule < static_cast<int>(rule_names().size()); ++rule) {
        for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
          Model one = make(d, rule, dtype), many = make(d, rule, dtype);
          run(one, 1, rule >= 0);
          run(many, 3, rule >= 0);
          ++runs;
          if (one.bits() != many.bits()) {
            std::printf("threads change bits: %s direction %d rule %d\n", set, d, rule);
            return 1;
          }
        }
      }
    }
  }
  std::printf("%d runs\n", runs);
  return 0;
}
