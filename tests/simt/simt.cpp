// The scheduler behind simt.h: a worker thread for each block, fibers on it.
#include "simt.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "block.h"

__thread simt::Index blockIdx, blockDim, gridDim;

namespace simt {

__thread Thread* current = nullptr;
unsigned seed = 0;
double patience_seconds = 10;
Traffic traffic = {};

namespace {

typedef std::chrono::steady_clock Clock;

struct Launch {
  unsigned grid, block;
  const std::function<void()>& body;
  Counter progress;              // rounds in which a block took a step
  std::vector<Counter> idle_at;  // the progress that left a block with nothing to do but spin

  bool all_idle() const {
    const uint64_t now = progress;
    return std::all_of(idle_at.begin(), idle_at.end(), [&](uint64_t at) { return at >= now; });
  }
};

/// An OS thread that runs a block of each launch. Never ends.
struct Worker : Block {
  // between host and worker; locks of its own, since a common one would order blocks
  std::mutex mutex;
  std::condition_variable changed;
  Launch* task = nullptr;
  Traffic moved = {};

  Order start, end;  // of a launch

  Clock::time_point idle_since;  // with progress as it was last seen
  uint64_t progress_seen = 0;

  Worker() {
    std::thread([this] { serve(); }).detach();
  }
  void start_block(Launch& launch, unsigned at);
  void finish_block();
  void serve();
  void prepare();
  void run();
  bool round(const std::vector<unsigned>& order, unsigned first, unsigned count);
  void wait_for_others(bool any_runs);
  [[noreturn]] void deadlock();
};

/// A fiber's life: the body of one launch after another.
void life() {
  Worker& w = static_cast<Worker&>(*fiber().block);
  fiber().context.arrived(w.scheduler);
  for (;;) {
    w.start.acquire();
    w.task->body();
    w.end_thread();
    w.end.release();
    w.leave();
  }
}

// -- in a worker ---------------------------------------------------------------------------------

void Worker::prepare() {
  const unsigned n = task->block;
  blockIdx.x = index;
  blockDim.x = n;
  gridDim.x = task->grid;
  while (fibers.size() < n) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers.back();
    f.index.x = fibers.size() - 1;
    f.block = this;
    if (!f.context.create(life, f.index.x)) fail("no memory for stacks");
  }
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = *fibers[i];
    f.traffic = {};
    f.done = false;
    f.awaited = nullptr;
  }
  warps.assign((n + 31) / 32, Warp());
  live = n;
  at_barrier = 0;
  progress_seen = 0;
}

void Worker::run() {
  prepare();
  const unsigned n = task->block;
  std::minstd_rand random(1000003 * seed + index);
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(order.begin(), order.end(), random);
  start.release();
  bool stirs = true;
  while (live) {
    const uint64_t before = steps;
    // with a seed some threads run ahead of others, unless nothing moves
    const bool all = !seed || !stirs;
    const unsigned first = all ? 0 : random() % n;
    const bool any_runs = round(order, first, all ? n : 1 + random() % n);
    stirs = steps != before;
    if (stirs) {
      __atomic_fetch_add(&task->progress.value, 1, __ATOMIC_RELAXED);
    } else if (all) {
      wait_for_others(any_runs);
    }
  }
  task->idle_at[index] = ~uint64_t(0);
  end.acquire();
  moved = {};
  for (unsigned i = 0; i < n; ++i) moved += fibers[i]->traffic;
}

/// Let `count` threads run until they wait; false where all of them have waited already.
bool Worker::round(const std::vector<unsigned>& order, unsigned first, unsigned count) {
  bool any_runs = false;
  for (unsigned k = first; k < first + count; ++k) {
    Fiber& f = *fibers[order[k < order.size() ? k : k - order.size()]];
    const Counter* awaited = f.awaited;
    if (f.done || (awaited && *awaited < f.goal)) continue;
    f.awaited = nullptr;
    any_runs = true;
    __atomic_store_n(&current, &f, __ATOMIC_RELAXED);
    scheduler.leave_for(f.context);
  }
  return any_runs;
}

/// No step was taken: the threads wait for each other, or spin until another block moves.
void Worker::wait_for_others(bool any_runs) {
  if (!any_runs) deadlock();
  const Clock::time_point now = Clock::now();
  const uint64_t progress = task->progress;
  task->idle_at[index] = progress_seen;  // before the round that is over
  if (progress != progress_seen) {
    progress_seen = progress;
    idle_since = now;
  } else if (std::chrono::duration<double>(now - idle_since).count() > patience_seconds &&
             task->all_idle()) {
    deadlock();
  }
  sched_yield();
}

void Worker::deadlock() {
  std::map<std::string, unsigned> places;
  for (unsigned i = 0; i < task->block; ++i) {
    if (!fibers[i]->done) ++places[static_cast<const char*>(fibers[i]->place)];
  }
  places.erase("__syncthreads");
  std::string report = "DEADLOCK in block " + std::to_string(index) + ": " + std::to_string(live) +
                       " live threads, " + std::to_string(at_barrier) + " at __syncthreads";
  for (const auto& [place, threads] : places) {
    report += ", " + std::to_string(threads) + " waiting in " + place;
  }
  fail(report.c_str());
}

void Worker::serve() {
  scheduler.adopt();
  for (std::unique_lock<std::mutex> lock(mutex);;) {
    changed.wait(lock, [this] { return task; });
    lock.unlock();
    run();
    lock.lock();
    task = nullptr;
    changed.notify_all();
  }
}

// -- in the host ---------------------------------------------------------------------------------

void Worker::start_block(Launch& launch, unsigned at) {
  const std::lock_guard<std::mutex> lock(mutex);
  index = at;
  task = &launch;
  changed.notify_all();
}

void Worker::finish_block() {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [this] { return !task; });
  traffic += moved;
}

}  // namespace

void launch(unsigned grid, unsigned block, const std::function<void()>& body) {
  if (grid < 1 || block < 1 || block > 1024) fail("a launch out of bounds");
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::vector<std::unique_ptr<Worker>>* threads = nullptr;
  static pid_t of = 0;
  if (of != getpid()) {  // a forked process has none of its parent's
    threads = new std::vector<std::unique_ptr<Worker>>;
    of = getpid();
  }
  auto& workers = *threads;
  while (workers.size() < grid) workers.push_back(std::make_unique<Worker>());
  std::vector<unsigned> order(grid);
  std::iota(order.begin(), order.end(), 0u);
  if (seed) std::shuffle(order.begin(), order.end(), std::minstd_rand(seed));
  Launch task{grid, block, body, {1}, std::vector<Counter>(grid)};
  for (unsigned i : order) workers[i]->start_block(task, i);
  for (unsigned i : order) workers[i]->finish_block();
}

void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

void yield(const char* place) {
  fiber().place = place;
  fiber().block->leave();
}

void step_taken() { ++fiber().block->steps; }

void sync_threads(const char* file, int line) { fiber().block->barrier(file, line); }

const Relaxed<uint64_t>* exchange(unsigned mask, uint64_t word, bool ordered, const char* place) {
  return fiber().block->meet(mask, word, ordered, place);
}

}  // namespace simt
