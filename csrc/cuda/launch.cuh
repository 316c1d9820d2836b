// Starting kernels: the few calls of the CUDA runtime that there are.
#pragma once

#include "cuda/device.cuh"
#include "cuda/engine.h"
#include "cuda/tables.h"

namespace layerlr {

#if defined(LAYERLR_SIMT)

inline const char* select_device(int) { return nullptr; }

inline const char* launch(void (*kernel)(StepArgs), int grid, int shared_bytes, bool,
                          const StepArgs& args, void*) {
  simt::launch(grid, tile_threads, shared_bytes, [&] { kernel(args); });
  return nullptr;
}

#else

inline const char* outcome(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* select_device(int device) { return outcome(cudaSetDevice(device)); }

/// `together`: all blocks are resident at once.
inline const char* launch(void (*kernel)(StepArgs), int grid, int shared_bytes, bool together,
                          const StepArgs& args, void* stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const auto at = static_cast<cudaStream_t>(stream);
  void* arguments[] = {const_cast<StepArgs*>(&args)};
  cudaError_t error = cudaSuccess;
  if (shared_bytes) {
    error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) {
    error = together ? cudaLaunchCooperativeKernel(function, grid, tile_threads, arguments,
                                                   shared_bytes, at)
                     : cudaLaunchKernel(function, grid, tile_threads, arguments, shared_bytes, at);
  }
  return outcome(error);
}

#endif

}  // namespace layerlr
