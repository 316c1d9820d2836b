// What the kernels ask of the machine: threads, barriers, memory. Under LAYERLR_SIMT the test
// suite's emulation stands in for all of it, so that the same kernels run on a CPU.
#pragma once

#include "core.h"

#if defined(LAYERLR_SIMT)
#include "simt.h"
#else

#define LAYERLR_KERNEL __global__
#define LAYERLR_DEVICE __device__ __forceinline__
/// Dynamic shared memory of the block, 16-byte aligned.
#define LAYERLR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace layerlr::device {

// -- memory of the whole device -----------------------------------------------------------------

/// 16 bytes of it, aligned.
struct alignas(16) Granule {
  uint32_t word[4];
};

/// Ordinary reads and writes of elements; all traffic of tensors goes through these three.
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
/// p, known to lie in shared memory.
template <class T>
LAYERLR_DEVICE T* in_shared(T* p) {
  __builtin_assume(__isShared(p));
  return p;
}
/// Copy a granule to shared memory; done when wait() says so.
LAYERLR_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
/// Close the group of copies that this thread has begun.
LAYERLR_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Wait until at most `younger` of this thread's groups are still under way.
template <int younger>
LAYERLR_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(younger) : "memory");
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
LAYERLR_DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
LAYERLR_DEVICE void store_release(unsigned* p, unsigned x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// -- arithmetic -----------------------------------------------------------------------------------

LAYERLR_DEVICE double fused_add(double x, double y, double z) { return __fma_rn(x, y, z); }

}  // namespace layerlr::device
#endif
