// CUDA kernels on a CPU, for tests: a block is an OS thread, a CUDA thread a fiber on it,
// __shared__ memory thread-local, and all blocks of a grid are resident at once. Counts the bytes
// that kernels move, reports deadlocks, and tells the sanitizers what orders memory and what does
// not. For g++ on x86-64 Linux, C++17, -pthread, with simt.cpp.
//
// Limits: a loop that waits must call load_acquire; 64 KB of stack a thread; 8 different masks a
// warp; under TSan about 8,000 threads in all. Outside TSan memory is ordered as on x86.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "x86-64 Linux only"
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace simt {

// -- for the host --------------------------------------------------------------------------------

/// Run body once for each thread of a one-dimensional grid. Calls from several host threads wait
/// for each other.
void launch(unsigned grid, unsigned block, const std::function<void()>& body);

/// Schedules: 0 takes threads in order; any other number varies the order in which blocks start
/// and threads run, the same way each time for a block.
extern unsigned seed;

/// Threads that spin are given up, with a report and abort(), when all blocks have had nothing else
/// to do for so long.
extern double patience_seconds;

/// What went through the functions of layerlr::device.
struct Traffic {
  uint64_t loaded, stored;  // bytes; loaded includes fresh ones
  uint64_t reads, writes;   // calls of all that read and write
  uint64_t vectors;         // bytes that vectors move, read and written
  uint64_t fresh;           // bytes by read_fresh

  Traffic& operator+=(const Traffic& x) {
    loaded += x.loaded, stored += x.stored, reads += x.reads, writes += x.writes;
    vectors += x.vectors, fresh += x.fresh;
    return *this;
  }
};

/// Of all launches so far; assign {} to reset.
extern Traffic traffic;

// -- for what follows ----------------------------------------------------------------------------

/// A variable of the emulation itself: atomic for the sanitizers' sake, orders nothing.
template <class T>
struct Relaxed {
  T value;
  operator T() const { return __atomic_load_n(&value, __ATOMIC_RELAXED); }
  T operator=(T x) {
    __atomic_store_n(&value, x, __ATOMIC_RELAXED);
    return x;
  }
  T operator++() { return *this = *this + 1; }
  T operator--() { return *this = *this - 1; }
};

struct Index {
  unsigned x;
};

/// The part of a fiber that headers use.
struct Thread {
  Index index;
  Traffic traffic;
};

#if defined(__PIC__) && !defined(__PIE__)  // a library that is loaded late has no room for it
#define SIMT_THREAD_LOCAL extern __thread
#else
#define SIMT_THREAD_LOCAL extern __thread __attribute__((tls_model("initial-exec")))
#endif
SIMT_THREAD_LOCAL Thread* current;

inline Thread& self() { return *__atomic_load_n(&current, __ATOMIC_RELAXED); }

void yield(const char* place);
void step_taken();
void sync_threads(const char* file, int line);
/// The words that all lanes of the mask brought; ordered: memory is, too.
const Relaxed<uint64_t>* exchange(unsigned mask, uint64_t word, bool ordered, const char* place);
/// Say what and abort.
[[noreturn]] void fail(const char* what);

template <class T>
T shuffle(unsigned mask, T x, unsigned from, const char* place) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "a number of up to 8 bytes");
  if (!(mask >> from & 1)) fail("a shuffle reads a lane outside its mask");
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  word = exchange(mask, word, false, place)[from];
  std::memcpy(&x, &word, sizeof x);
  return x;
}

/// A GPU does not read or write across the alignment of a type.
template <class T>
void check_aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) fail("a misaligned access");
}

inline unsigned lane() { return self().index.x % 32; }

}  // namespace simt

// -- CUDA's names --------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __shared__ static thread_local

#define LAYERLR_KERNEL inline
#define LAYERLR_DEVICE inline
#define LAYERLR_PARAMETER

#define threadIdx (simt::self().index)
SIMT_THREAD_LOCAL simt::Index blockIdx, blockDim, gridDim;

/// All threads must come to the same line of the source.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::sync_threads(file, line);
}
inline void __syncwarp(unsigned mask = ~0u) { simt::exchange(mask, 0, true, "__syncwarp"); }

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  const int lane = static_cast<int>(simt::lane());
  return simt::shuffle(mask, x, (lane & -width) | (from & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return simt::shuffle(mask, x, simt::lane() ^ (bits & 31), "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by) {
  const unsigned lane = simt::lane();
  return simt::shuffle(mask, x, lane + by < 32 ? lane + by : lane, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by) {
  const unsigned lane = simt::lane();
  return simt::shuffle(mask, x, lane >= by ? lane - by : lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
  const auto* words = simt::exchange(mask, yes != 0, false, "__ballot_sync");
  unsigned all = 0;
  for (unsigned i = 0; i < 32; ++i) all |= unsigned(mask >> i & words[i] & 1) << i;
  return all;
}
inline bool __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline bool __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }

// -- device.cuh's --------------------------------------------------------------------------------

namespace layerlr::device {

template <class T>
T read(const T* p) {
  simt::check_aligned(p);
  simt::Traffic& count = simt::self().traffic;
  count.loaded += sizeof(T);
  ++count.reads;
  return *p;
}
template <class T>
void write(T* p, T x) {
  simt::check_aligned(p);
  simt::Traffic& count = simt::self().traffic;
  count.stored += sizeof(T);
  ++count.writes;
  *p = x;
}
template <class T>
T read_fresh(const T* p) {
  simt::check_aligned(p);
  simt::Traffic& count = simt::self().traffic;
  count.loaded += sizeof(T);
  count.fresh += sizeof(T);
  return *p;
}

/// Vectors of 4, 8 or 16 bytes; what is read first may be read again.
template <class V>
V read_vector(const V* p) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one access");
  simt::self().traffic.vectors += sizeof(V);
  return read(p);
}
template <class V>
V read_vector_last(const V* p) {
  return read_vector(p);
}
template <class V>
void write_vector(V* p, const V& x) {
  simt::self().traffic.vectors += sizeof(V);
  write(p, x);
}
template <class V>
void write_vector_last(V* p, const V& x) {
  write_vector(p, x);
}

inline unsigned add_acq_rel(unsigned* p, unsigned x) {
  simt::step_taken();
  return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
}
inline unsigned add_relaxed(unsigned* p, unsigned x) {
  simt::step_taken();
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
/// Lets other threads run first, so that a loop around it ends.
inline unsigned load_acquire(const unsigned* p) {
  simt::yield("load_acquire");
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release(unsigned* p, unsigned x) {
  simt::step_taken();
  __atomic_store_n(p, x, __ATOMIC_RELEASE);
}

inline void wait_for(const unsigned* p, unsigned x) {
  while (load_acquire(p) != x) {
  }
}

inline void forget() {}

inline float larger_magnitude(float x, float y) {
  const float a = std::fabs(x), b = std::fabs(y);
  return a >= b || a != a ? a : b;
}
inline uint32_t byte_of_float(uint32_t word, int i) {
  return 0x4b000000u | (word >> (8 * i) & 0xffu);
}
inline double fused_add(double x, double y, double z) { return std::fma(x, y, z); }

}  // namespace layerlr::device
