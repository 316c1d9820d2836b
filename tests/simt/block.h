// A block: its fibers, its barrier, the meetings of its warps. For simt.cpp.
#pragma once

#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

typedef Relaxed<uint64_t> Counter;

struct Block;

struct Fiber : Thread {
  Block* block;
  Context context;
  Relaxed<bool> done;
  Relaxed<const Counter*> awaited;  // runs on when this has reached goal; null: at any time
  Counter goal;
  Relaxed<const char*> place;  // where it waits
};

inline Fiber& fiber() { return static_cast<Fiber&>(self()); }

/// Where those lanes of a warp meet that a mask names, turn after turn.
struct Meeting {
  Relaxed<unsigned> mask;
  Counter arrivals;
  uint64_t turn[32];
  Relaxed<uint64_t> words[2][32];
  Order order[2];
};

struct Warp {
  Meeting meetings[8];  // as many masks in a launch
};

/// What the threads of a block share; members that are not Relaxed change between launches only.
struct Block {
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned index = 0;
  Relaxed<unsigned> live = {};  // threads that have not ended
  Counter steps = {};           // whatever may let another thread go on

  Relaxed<unsigned> at_barrier = {};
  Counter barriers = {};
  Order barrier_order[2];
  Relaxed<const char*> barrier_file = {};
  Relaxed<int> barrier_line = {};

  // -- in a fiber --------------------------------------------------------------------------------

  void leave() { fiber().context.leave_for(scheduler); }

  void wait_until(const Counter& counter, uint64_t goal, const char* place) {
    if (counter >= goal) return;
    Fiber& f = fiber();
    f.goal = goal;
    f.place = place;
    f.awaited = &counter;
    leave();
  }

  void barrier(const char* file, int line) {
    if (at_barrier == 0) {
      barrier_file = file;
      barrier_line = line;
    } else if (barrier_line != line || (barrier_file != file && std::strcmp(barrier_file, file))) {
      fail(("DIVERGENCE in block " + std::to_string(index) + ": threads at __syncthreads of " +
            std::string(barrier_file) + ":" + std::to_string(barrier_line) + " and of " + file +
            ":" + std::to_string(line))
               .c_str());
    }
    const uint64_t turn = barriers + 1;
    Order& order = barrier_order[turn & 1];
    order.release();
    ++at_barrier;
    ++steps;
    open_barrier();
    wait_until(barriers, turn, "__syncthreads");
    order.acquire();
  }

  void end_thread() {
    fiber().done = true;
    --live;
    ++steps;
    open_barrier();  // the others wait for this thread no longer
  }

  void open_barrier() {
    if (at_barrier == 0 || at_barrier != live) return;
    at_barrier = 0;
    ++barriers;
  }

  /// See simt::exchange.
  const Relaxed<uint64_t>* meet(unsigned mask, uint64_t word, bool ordered, const char* place) {
    Fiber& f = fiber();
    const unsigned me = lane();
    if (!(mask >> me & 1)) fail("a lane is not in its own mask");
    Warp& warp = warps[f.index.x / 32];
    Meeting* m = warp.meetings;
    while (m->mask && m->mask != mask) {
      if (++m == std::end(warp.meetings)) fail("more than 8 different masks in a warp");
    }
    m->mask = mask;
    const uint64_t turn = ++m->turn[me];
    m->words[turn & 1][me] = word;
    if (ordered) m->order[turn & 1].release();
    ++m->arrivals;
    ++steps;
    wait_until(m->arrivals, turn * __builtin_popcount(mask), place);
    if (ordered) m->order[turn & 1].acquire();
    return m->words[turn & 1];
  }
};

}  // namespace simt
