// How many blocks of the step's kernels the GPUs hold that they are compiled for, from what the
// compiler says of them. Reads lines of
//   compute capability, kernel, registers, bytes of shared memory
// and writes one for each GPU and kernel:
//   GPU, kernel, blocks of a multiprocessor
#include <cuda_runtime_api.h>

#include <iostream>
#include <string>

// After the runtime's header, whose structs it converts.
#include <cuda_occupancy.h>

#include "cuda/tables.h"

using namespace layerlr;

namespace {

struct Gpu {
  const char* name;
  int capability, shared_kib;  // of a multiprocessor
};
const Gpu gpus[] = {{"A100", 80, 164}, {"H100", 90, 228}, {"H200", 90, 228}, {"B200", 100, 228}};

int resident_blocks(const Gpu& gpu, int registers, int shared_bytes) {
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
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = block_threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = shared_bytes;
  kernel.numBlockBarriers = 1;
  const cudaOccDeviceState state{};
  cudaOccResult result{};
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, block_threads, 0);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : 0;
}

}  // namespace

int main() {
  int capability, registers, shared_bytes;
  std::string kernel;
  while (std::cin >> capability >> kernel >> registers >> shared_bytes) {
    for (const Gpu& gpu : gpus) {
      if (gpu.capability != capability) continue;
      std::cout << gpu.name << " " << kernel << " " << resident_blocks(gpu, registers, shared_bytes)
                << "\n";
    }
  }
}
