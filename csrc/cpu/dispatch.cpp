// Which instruction set the kernels use, asked once.
#include <cstring>

#include "cpu/kernels.h"

namespace layerlr {

const Kernels* kernels_default(int direction, DType dtype, Coding coding);
#if defined(LAYERLR_X86)
const Kernels* kernels_avx2(int direction, DType dtype, Coding coding);
const Kernels* kernels_avx512(int direction, DType dtype, Coding coding);
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* (*kernels)(int, DType, Coding);
  bool here;
};

/// Best first.
InstructionSet known(int i) {
  const InstructionSet sets[] = {
#if defined(LAYERLR_X86)
      {"avx512", kernels_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")},
      {"avx2", kernels_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
      {"default", kernels_default, true},
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
  return *chosen.kernels(direction, dtype, coding);
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
