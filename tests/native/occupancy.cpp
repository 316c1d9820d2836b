// Whether every kernel fits on the GPUs that it is compiled for, from what the compiler says of it
// and what the engine asks for. Reads lines of
//   compute capability, kernel, direction or -, registers, bytes of static shared memory
// and writes one for each GPU and kernel. Exits with 1 where no block fits.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <iostream>
#include <string>

// After the runtime's header, whose structs it converts.
#include <cuda_occupancy.h>

#include "cuda/schedule.h"

using namespace layerlr;

namespace {

struct Gpu {
  const char* name;
  int capability, multiprocessors, shared_kib;  // of a multiprocessor; a block gets 1 less
};
const Gpu gpus[] = {{"A100", 80, 108, 164},
                    {"H100", 90, 132, 228},
                    {"H200", 90, 132, 228},
                    {"B200", 100, 148, 228}};

const char* const directions[] = {
#define LAYERLR_NAME(D) #D,
    LAYERLR_DIRECTIONS(LAYERLR_NAME)
#undef LAYERLR_NAME
};

/// The most dynamic shared memory that step_kernel is launched with, over dtypes and rule orders.
int dynamic_bytes(const Gpu& gpu, const std::string& direction) {
  DeviceInfo device;
  device.multiprocessors = gpu.multiprocessors;
  device.tile_threads = tile_threads;
  device.shared_bytes = (gpu.shared_kib - 1) * 1024;
  device.cooperative = true;
  int most = 0;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    for (const bool update : {false, true}) {
      Plan plan;
      plan.direction = static_cast<int>(
          std::find(std::begin(directions), std::end(directions), direction) - directions);
      plan.rule.update = update;
      plan.tensors.resize(1);
      plan.tensors[0].dtype = dtype;
      plan.spans = {{0, 0, 0, 1'000'000}};
      plan.layers.resize(1);
      const Schedule s = make_schedule(plan, true, device, {});
      most = std::max(most, s.rings.bytes_in_all());
    }
  }
  return most;
}

/// Blocks that a multiprocessor holds at once.
int resident_blocks(const Gpu& gpu, int registers, int static_bytes, int dynamic_bytes) {
  cudaOccDeviceProp device{};
  device.computeMajor = gpu.capability / 10;
  device.computeMinor = gpu.capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 64 * 1024;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerBlockOptin = (gpu.shared_kib - 1) * 1024;
  device.sharedMemPerMultiprocessor = gpu.shared_kib * 1024;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = gpu.multiprocessors;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = tile_threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = static_bytes;
  kernel.maxDynamicSharedSizeBytes = dynamic_bytes;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.numBlockBarriers = 1;
  const cudaOccDeviceState state{};
  cudaOccResult result{};
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, tile_threads,
                                              dynamic_bytes) != CUDA_OCC_SUCCESS) {
    return -1;
  }
  return result.activeBlocksPerMultiprocessor;
}

}  // namespace

int main() {
  int capability, registers, static_bytes, answer = 0;
  std::string kernel, direction;
  while (std::cin >> capability >> kernel >> direction >> registers >> static_bytes) {
    for (const Gpu& gpu : gpus) {
      if (gpu.capability != capability) continue;
      const int dynamic = kernel == "step_kernel" ? dynamic_bytes(gpu, direction) : 0;
      const int blocks = resident_blocks(gpu, registers, static_bytes, dynamic);
      std::cout << gpu.name << ": " << kernel << " " << direction << ", " << registers
                << " registers, " << static_bytes << " + " << dynamic << " bytes, " << blocks
                << " blocks a multiprocessor\n";
      if (blocks < 1) answer = 1;
    }
  }
  return answer;
}
