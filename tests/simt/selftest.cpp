// Tests of the emulation: what must run right, and a kernel with the mistakes that must be caught.
// selftest NAME runs one of them; exits with 1 where a result is wrong.
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda/device.cuh"

using namespace layerlr;

namespace {

bool wrong = false;

void check(bool right, const char* what) {
  if (right) return;
  std::printf("WRONG: %s\n", what);
  wrong = true;
}

// -- a kernel and its mutants ---------------------------------------------------------------------

// clang-format off
#define MUTANTS(X) \
  X(sound) X(small_shared) X(unclamped_tail) X(misaligned_vector) X(missing_landing_barrier) \
  X(refilled_too_early) X(reused_too_early) X(unordered_after_wait) X(relaxed_flag) \
  X(unset_flag) X(missing_lane) X(divergent_barrier) X(two_barriers)
// clang-format on

#define NAME(mutant) mutant,
enum Mutant { MUTANTS(NAME) };

constexpr int threads = 64;
constexpr int tile = 4 * threads;  // elements: a vector a thread

struct alignas(16) Four {
  float x[4];
};
struct alignas(8) Two {
  float x[2];
};

template <Mutant mutant>
LAYERLR_DEVICE float block_sum(float x) {
  __shared__ float part[mutant == small_shared ? threads / 32 - 1 : threads / 32];
  if (mutant == divergent_barrier && threadIdx.x % 2) __syncthreads();
  for (int bits = 16; bits; bits /= 2) {
    if (mutant == missing_lane && threadIdx.x == 5) break;
    x += __shfl_xor_sync(~0u, x, bits);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += part[i];
  if (mutant != reused_too_early) __syncthreads();
  return sum;
}

/// This thread's part of tile t: a vector, at the end elements, zeros beyond.
template <Mutant mutant>
LAYERLR_DEVICE Four fetch(const float* x, int n, int t) {
  const int i = tile * t + 4 * threadIdx.x;
  if (i + 4 <= n || (mutant == unclamped_tail && i < n)) {
    const float* const from = x + i + (mutant == misaligned_vector);
    return device::read_vector(reinterpret_cast<const Four*>(from));
  }
  Four part = {};
  for (int k = 0; i + k < n; ++k) part.x[k] = device::read(x + i + k);
  return part;
}

/// x /= sum(x)
template <Mutant mutant>
LAYERLR_KERNEL void __launch_bounds__(threads)
    normalize(float* x, int n, float* partial, unsigned* arrived) {
  __shared__ Four at[threads];
  if (mutant == two_barriers) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  float sum = 0;
  for (int t = blockIdx.x; t * tile < n; t += gridDim.x) {
    at[threadIdx.x] = fetch<mutant>(x, n, t);
    if (mutant != missing_landing_barrier) __syncthreads();
    for (int i = threadIdx.x; i < tile; i += threads) sum += at[i / 4].x[i % 4];
    if (mutant != refilled_too_early) __syncthreads();
  }
  const float count = block_sum<mutant>(1);
  sum = block_sum<mutant>(sum) * (count / threads);
  if (threadIdx.x == 0) {
    device::write(partial + blockIdx.x, sum);
    if (mutant == relaxed_flag) {
      __atomic_fetch_add(arrived, 1, __ATOMIC_RELAXED);
    } else if (mutant != unset_flag || blockIdx.x > 0) {
      device::add_acq_rel(arrived, 1);
    }
    device::wait_for(arrived, gridDim.x);
  }
  if (mutant != unordered_after_wait) __syncthreads();
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += device::read_fresh(partial + b);
  for (int t = blockIdx.x; t * tile < n; t += gridDim.x) {
    const int i = tile * t + 4 * threadIdx.x;
    Four part = fetch<mutant>(x, n, t);
    for (float& each : part.x) each /= total;
    if (i + 4 <= n) {
      device::write_vector(reinterpret_cast<Four*>(x + i), part);
    } else {
      for (int k = 0; i + k < n; ++k) device::write(x + i + k, part.x[k]);
    }
  }
}

template <Mutant mutant>
void normalizes() {
  const unsigned grid = 4;
  for (int n : {1, tile - 1, tile, 10 * tile + 7}) {
    for (simt::seed = 0; simt::seed < 3; ++simt::seed) {
      const auto value = [](int i) { return float(1 + i / tile); };
      std::vector<float> x(n), partial(grid);
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += x[i] = value(i);
      unsigned arrived = 0;
      simt::launch(grid, threads,
                   [&] { normalize<mutant>(x.data(), n, partial.data(), &arrived); });
      bool right = true;
      for (int i = 0; i < n; ++i) right = right && std::abs(x[i] * sum / value(i) - 1) < 1e-3;
      check(right, "normalize");
    }
  }
  simt::seed = 0;
}

// -- what must run right --------------------------------------------------------------------------

template <class T>
LAYERLR_KERNEL void shuffle_kernel(int* errors) {
  const int lane = threadIdx.x % 32;
  const auto value = [](int of) { return T(of) * T(1.25) + T(100); };
  const T x = value(lane);
  bool right = true;
  for (int by = 0; by < 32; ++by) {
    right = right && __shfl_xor_sync(~0u, x, by) == value(lane ^ by) &&
            __shfl_sync(~0u, x, by) == value(by) &&
            __shfl_down_sync(~0u, x, by) == value(lane + by < 32 ? lane + by : lane) &&
            __shfl_up_sync(~0u, x, by) == value(lane >= by ? lane - by : lane);
  }
  const unsigned half = lane < 16 ? 0xffff : 0xffff0000;  // both halves of a warp at once
  right = right && __shfl_xor_sync(half, x, 8) == value(lane ^ 8);
  right = right && __ballot_sync(~0u, lane % 3 == 0) == 0x49249249;
  right = right && __ballot_sync(half, 1) == half;
  right = right && __any_sync(~0u, lane == 7) && !__any_sync(~0u, 0);
  right = right && __all_sync(half, 1) && !__all_sync(~0u, lane != 7);
  if (!right) __atomic_fetch_add(errors, 1, __ATOMIC_RELAXED);
}

void collectives() {
  int errors = 0;
  for (simt::seed = 0; simt::seed < 3; ++simt::seed) {
    simt::launch(2, 64, [&] { shuffle_kernel<int>(&errors); });
    simt::launch(2, 64, [&] { shuffle_kernel<unsigned>(&errors); });
    simt::launch(2, 64, [&] { shuffle_kernel<float>(&errors); });
    simt::launch(2, 64, [&] { shuffle_kernel<double>(&errors); });
  }
  simt::seed = 0;
  check(errors == 0, "a shuffle or a vote");
}

/// Each lane reads what its neighbour wrote.
template <bool ordered>
LAYERLR_KERNEL void neighbour_kernel(int* to) {
  __shared__ int box[32];
  box[threadIdx.x] = threadIdx.x;
  if (ordered) __syncwarp();
  __shfl_sync(~0u, 0, 0);  // orders no memory
  to[threadIdx.x] = box[threadIdx.x ^ 1];
}

template <bool ordered>
void neighbours() {
  std::vector<int> to(32);
  simt::launch(1, 32, [&] { neighbour_kernel<ordered>(to.data()); });
  for (int i = 0; i < 32; ++i) check(to[i] == (i ^ 1), "a neighbour's word");
}

void traffic() {
  alignas(16) float x[8] = {};
  double d = 0;
  simt::traffic = {};
  simt::launch(2, 32, [&] {
    if (blockIdx.x != 0 || threadIdx.x != 3) return;
    for (float& each : x) device::write(&each, 1.0f);
    const Four four = device::read_vector(reinterpret_cast<const Four*>(x));
    const Two two = device::read_vector_last(reinterpret_cast<const Two*>(x + 6));
    device::write_vector(reinterpret_cast<Four*>(x + 4), four);
    device::write_vector_last(reinterpret_cast<Two*>(x + 2), two);
    d = device::read(x) + device::read(&d) + device::read_fresh(&d);
  });
  const simt::Traffic& t = simt::traffic;
  check(t.writes == 8 + 2 && t.stored == 8 * 4 + 16 + 8, "writes");
  check(t.reads == 2 + 2 && t.fresh == 8, "reads");
  check(t.loaded == 4 + 8 + 8 + 16 + 8, "bytes loaded");
  check(t.vectors == 2 * (16 + 8), "bytes of vectors");
}

/// A vector begins at a multiple of its size; type and place as the argument says.
template <class V, bool write, int elements>
void misplaced() {
  alignas(16) float x[8] = {};
  simt::launch(1, 1, [&] {
    V* const p = reinterpret_cast<V*>(x + elements);
    if (write) {
      device::write_vector(p, V());
    } else {
      device::read_vector(p);
    }
  });
}

void indices() {
  for (unsigned grid : {1, 3, 20}) {
    for (unsigned block : {1, 31, 33, 256}) {
      if (grid * block > 1000) continue;  // TSan is slow with many fibers
      std::vector<int> visits(grid * block);
      simt::launch(grid, block, [&] {
        check(gridDim.x == grid && blockDim.x == block, "dimensions");
        ++visits[blockIdx.x * block + threadIdx.x];
      });
      check(visits == std::vector<int>(grid * block, 1), "each thread once");
    }
  }
}

/// Every block waits for every other; threads that have ended hold up no barrier.
void resident() {
  const unsigned grid = 32;
  unsigned arrived = 0;
  simt::launch(grid, 32, [&] {
    if (threadIdx.x >= 20) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      device::add_acq_rel(&arrived, 1);
      device::wait_for(&arrived, grid);
    }
    __syncthreads();
  });
  check(arrived == grid, "all blocks at once");
}

/// The order in which threads run.
std::vector<unsigned> schedule(unsigned seed) {
  std::vector<unsigned> order(256);
  unsigned ran = 0;
  simt::seed = seed;
  simt::launch(1, 64, [&] {
    for (int i = 0; i < 4; ++i) {
      order[__atomic_fetch_add(&ran, 1, __ATOMIC_RELAXED)] = threadIdx.x;
      __syncthreads();
    }
  });
  simt::seed = 0;
  return order;
}

void schedules() {
  std::set<std::vector<unsigned>> seen;
  for (unsigned seed = 0; seed < 5; ++seed) {
    const std::vector<unsigned> order = schedule(seed);
    check(order == schedule(seed), "a schedule again");
    seen.insert(order);
  }
  check(seen.size() == 5, "schedules that differ");
}

}  // namespace

int main(int, char** arguments) {
#define ENTRY(mutant) {#mutant, normalizes<mutant>},
  const std::map<std::string, void (*)()> all = {
      MUTANTS(ENTRY)  // what else goes wrong, and what must run right:
      {"collectives", collectives},
      {"neighbours", neighbours<true>},
      {"unordered_neighbours", neighbours<false>},
      {"traffic", traffic},
      {"placed", misplaced<Two, true, 2>},
      {"misplaced_read", misplaced<Four, false, 2>},
      {"misplaced_write", misplaced<Two, true, 1>},
      {"indices", indices},
      {"resident", resident},
      {"schedules", schedules},
  };
  simt::patience_seconds = 0.3;
  all.at(arguments[1])();
  return wrong;
}
