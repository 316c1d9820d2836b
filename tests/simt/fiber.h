// Stacks to change between, and what the sanitizers must hear about it. For simt.cpp.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if defined(__has_feature)
#define SIMT_HAS(x) __has_feature(x)
#else
#define SIMT_HAS(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || SIMT_HAS(address_sanitizer)
#define SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || SIMT_HAS(thread_sanitizer)
#define SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

// Save the registers that a call preserves, change stacks, restore.
extern "C" void simt_switch(void** from, void* to);
asm(R"(.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

/// An edge of TSan's order: what was done before a release is seen after a later acquire.
struct Order {
  char here;
  void release() {
#if defined(SIMT_TSAN)
    __tsan_release(this);
#endif
  }
  void acquire() {
#if defined(SIMT_TSAN)
    __tsan_acquire(this);
#endif
  }
};

/// A stack and the place on it where to go on.
struct Context {
  void* pointer = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
  void* thread = nullptr;      // TSan's

  /// The context of the OS thread that calls. Its stack is known once a fiber has arrived.
  void adopt() {
#if defined(SIMT_TSAN)
    thread = __tsan_get_current_fiber();
#endif
  }

  /// A new stack, kept for ever, on which the first arrival calls begin(). `color` spreads the
  /// stacks over cache lines, or they would drive each other out. False where memory is short.
  bool create(void (*begin)(), unsigned color) {
#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
    size = 256 << 10;
#else
    size = 64 << 10;
#endif
    void* stack = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return false;
    bottom = stack;
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack) + size - 64 * (color % 64));
    *--top = 0;  // where backtraces end; so the stack is aligned as after a call
    *--top = reinterpret_cast<uintptr_t>(begin);
    pointer = top - 6;  // registers, whatever they hold
#if defined(SIMT_TSAN)
    thread = __tsan_create_fiber(0);
#endif
    return true;
  }

  /// Go there; returns when someone comes back. Orders no memory: TSan takes each fiber for a
  /// thread, and what a barrier should have ordered must not look ordered without it.
  void leave_for(Context& to) {
    void** const from = &pointer;
    void* const there = to.pointer;
#if defined(SIMT_ASAN)
    __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
#endif
#if defined(SIMT_TSAN)
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
    simt_switch(from, there);
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  /// First thing of a fresh fiber that was entered from `from`.
  void arrived([[maybe_unused]] Context& from) {
#if defined(SIMT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#endif
  }
};

}  // namespace simt
