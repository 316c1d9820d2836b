// What the kernels ask of the machine: threads, barriers, memory. Under LAYERLR_SIMT the test
// suite's emulation stands in for all of it, so that the same kernels run on a CPU.
#pragma once

#include "core.h"

#if defined(LAYERLR_SIMT)
#include "simt.h"
#else

#define LAYERLR_KERNEL __global__
#define LAYERLR_DEVICE __device__ __forceinline__
// A parameter of a kernel whose address a function is given: without it a copy lies on the stack.
#define LAYERLR_PARAMETER __grid_constant__

namespace layerlr::device {

// -- memory of the whole device -----------------------------------------------------------------

/// 4, 8 or 16 bytes of it, as one access moves them.
template <int bytes>
struct Word {
  typedef uint4 type;
};
template <>
struct Word<4> {
  typedef uint32_t type;
};
template <>
struct Word<8> {
  typedef uint2 type;
};

/// Ordinary reads and writes; all traffic of tensors goes through these six.
template <class T>
LAYERLR_DEVICE T read(const T* p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}
template <class T>
LAYERLR_DEVICE void write(T* p, T x) {
  __builtin_assume(__isGlobal(p));
  *p = x;
}
/// A vector, past the L1 cache.
template <class V>
LAYERLR_DEVICE V read_vector(const V* p) {
  typedef typename Word<sizeof(V)>::type W;
  const W word = __ldcg(reinterpret_cast<const W*>(p));
  return reinterpret_cast<const V&>(word);
}
/// A vector that the L2 cache may let go of first.
template <class V>
LAYERLR_DEVICE V read_vector_last(const V* p) {
  typedef typename Word<sizeof(V)>::type W;
  const W word = __ldcs(reinterpret_cast<const W*>(p));
  return reinterpret_cast<const V&>(word);
}
template <class V>
LAYERLR_DEVICE void write_vector(V* p, const V& x) {
  typedef typename Word<sizeof(V)>::type W;
  __stcg(reinterpret_cast<W*>(p), reinterpret_cast<const W&>(x));
}
template <class V>
LAYERLR_DEVICE void write_vector_last(V* p, const V& x) {
  typedef typename Word<sizeof(V)>::type W;
  __stcs(reinterpret_cast<W*>(p), reinterpret_cast<const W&>(x));
}

/// Read what another block may have written in this launch, past the L1 cache.
template <class T>
LAYERLR_DEVICE T read_fresh(const T* p) {
  return __ldcg(p);
}

// -- between blocks -------------------------------------------------------------------------------

/// Add to a counter; what was written before is seen by whoever sees the sum. Returns the old
/// value.
LAYERLR_DEVICE unsigned add_acq_rel(unsigned* p, unsigned x) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(x)
               : "memory");
  return old;
}
/// The same, ordering nothing.
LAYERLR_DEVICE unsigned add_relaxed(unsigned* p, unsigned x) {
  unsigned old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x));
  return old;
}
LAYERLR_DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
LAYERLR_DEVICE void store_release(unsigned* p, unsigned x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
/// Wait until *p is x. After ten seconds it gives up: an error tells more than a GPU that hangs.
LAYERLR_DEVICE void wait_for(const unsigned* p, unsigned x) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  while (load_acquire(p) != x) {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (now - start > 10'000'000'000ull) __trap();
    __nanosleep(32);
  }
}

/// What was read before this is read again after it, where that is cheaper than to keep it.
LAYERLR_DEVICE void forget() { asm volatile("" ::: "memory"); }

// -- arithmetic -----------------------------------------------------------------------------------

/// The larger of |x| and |y|; NaN where either is.
LAYERLR_DEVICE float larger_magnitude(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(fabsf(x)), "f"(fabsf(y)));
  return z;
}
/// Byte i of a word, and the bytes of 2^23 above it: a float, 2^23 and that byte.
LAYERLR_DEVICE uint32_t byte_of_float(uint32_t word, int i) {
  return __byte_perm(word, 0x4b000000u, 0x7440u | i);
}
LAYERLR_DEVICE double fused_add(double x, double y, double z) { return __fma_rn(x, y, z); }

}  // namespace layerlr::device
#endif
