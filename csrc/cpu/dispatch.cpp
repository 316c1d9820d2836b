// Which instruction set the kernels use, asked once.
#include <cstring>

#include "cpu/kernels.h"
#if defined(LAYERLR_X86)
#include <cpuid.h>
#endif

namespace layerlr {

namespace {

#if defined(LAYERLR_X86)
/// Whether halves are converted by instructions; clang's __builtin_cpu_supports does not know.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct InstructionSet {
  const char* name;
  const DirectionKernels& (*kernels)(int direction);
  bool here;
};

template <Isa isa>
const DirectionKernels& kernels(int direction) {
  const DirectionKernels& (*const all[])() = {
#define LAYERLR_ROW(D) kernels_of<isa, D>,
      LAYERLR_DIRECTIONS(LAYERLR_ROW)
#undef LAYERLR_ROW
  };
  return all[direction]();
}

/// Best first.
InstructionSet known(int i) {
  const InstructionSet sets[] = {
#if defined(LAYERLR_X86)
      {"avx512", kernels<Isa::avx512>,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")},
      {"avx2", kernels<Isa::avx2>,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()},
#endif
      {"default", kernels<Isa::any>, true},
  };
  return i < static_cast<int>(sizeof sets / sizeof *sets) ? sets[i] : InstructionSet{};
}

InstructionSet best() {
  int i = 0;
  while (!known(i).here) ++i;
  return known(i);
}

InstructionSet chosen = best();

}  // namespace

const Kernels& kernels_for(int direction, DType dtype, Coding coding) {
  return *chosen.kernels(direction).of[static_cast<int>(coding)][static_cast<int>(dtype)];
}

const char* instruction_set() { return chosen.name; }

bool use_instruction_set(const char* name) {
  for (int i = 0; known(i).name; ++i) {
    if (std::strcmp(known(i).name, name) == 0 && known(i).here) {
      chosen = known(i);
      return true;
    }
  }
  return false;
}

}  // namespace layerlr
