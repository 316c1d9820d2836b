// Starting kernels: the few calls of the CUDA runtime that there are.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/kernels.cuh"

namespace layerlr {

#if defined(LAYERLR_SIMT)

inline const char* select_device(int) { return nullptr; }

/// Blocks of a grid whose blocks take items: all that the device has room for, 8 here.
inline const char* room_for(Kernel, int, int* blocks) {
  *blocks = 8;
  return nullptr;
}

inline const char* launch(Kernel kernel, int grid, int threads, const StepArgs& args, void*) {
  simt::launch(grid, threads, [&] { kernel(args); });
  return nullptr;
}

#else

inline const char* outcome(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* select_device(int device) { return outcome(cudaSetDevice(device)); }

/// Blocks of a kernel that the device has room for; asked once.
inline const char* room_for(Kernel kernel, int device, int* blocks) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& answer = known[{kernel, device}];
  *blocks = answer;
  if (answer) return nullptr;
  int multiprocessors = 0, each = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block_threads, 0);
  }
  if (error == cudaSuccess) *blocks = answer = std::max(1, multiprocessors * each);
  return outcome(error);
}

inline const char* launch(Kernel kernel, int grid, int threads, const StepArgs& args,
                          void* stream) {
  void* arguments[] = {const_cast<StepArgs*>(&args)};
  return outcome(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, threads, arguments,
                                  0, static_cast<cudaStream_t>(stream)));
}

#endif

}  // namespace layerlr
