// The door to the GPU kernels: plain pointers in, launches out. No torch here, nor CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

namespace layerlr {

struct StepArgs;

/// What a schedule needs to know of a device.
struct DeviceInfo {
  int multiprocessors = 0;
  int tile_elements = 0;  // what these kernels were built for
};

/// The functions of one build of the kernels. Each returns null, or what went wrong. `device`
/// counts as the CUDA runtime does, `stream` is a cudaStream_t of it.
struct Engine {
  /// Properties of a device.
  const char* (*info)(int device, DeviceInfo* answer);
  /// One step, in one launch.
  const char* (*step)(const StepArgs& args, int device, void* stream);
  /// The two halves of a step: what leaves args.layer_sums, and what follows from them.
  const char* (*measure)(const StepArgs& args, int device, void* stream);
  const char* (*apply)(const StepArgs& args, int device, void* stream);
  /// Copy bytes, a multiple of 4, to device memory in stream order; `from` is free on return.
  const char* (*upload)(void* to, const void* from, size_t bytes, int device, void* stream);
  /// Whether what is launched there is recorded for a graph, not run.
  bool (*capturing)(void* stream);
};

/// What liblayerlr_cuda.so says of itself, by its one function, `layerlr_cuda_library`. `layout` is
/// first in every release: whoever finds another one there than his own reads no further.
struct Library {
  const char* layout;         // the release, and a hash of the headers that both sides include
  const char* architectures;  // compiled for, oldest first: "80;90"
  Engine engine;
};

}  // namespace layerlr
