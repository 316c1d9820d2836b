// The functions behind engine.h.
#include <cstring>

#include "cuda/engine.h"
#include "cuda/launch.cuh"

namespace layerlr {

#if !defined(LAYERLR_SIMT)

// Not in the unnamed namespace: nvcc would put a hash of this file's path into the kernel's name.

/// Bytes that a launch can carry along: 4 KB of arguments, 32 KB since CUDA 12.1. All of them go
/// to the device, and a step's new numbers are few.
constexpr int little = 1024, most = CUDART_VERSION >= 12010 ? 32 * 1024 - 64 : 3840;

template <int room>
struct Payload {
  char bytes[room];
};

template <int room>
__global__ void upload_kernel(char* to, const __grid_constant__ Payload<room> payload, int bytes) {
  for (int i = threadIdx.x * 4; i < bytes; i += blockDim.x * 4) {
    *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(payload.bytes + i);
  }
}

#define LAYERLR_EXTERN(D) extern template DirectionKernels kernels_of<D>();
LAYERLR_DIRECTIONS(LAYERLR_EXTERN)
#undef LAYERLR_EXTERN
#endif

namespace {

DirectionKernels kernels_for(int direction) {
  DirectionKernels (*const all[])() = {
#define LAYERLR_ROW(D) kernels_of<D>,
      LAYERLR_DIRECTIONS(LAYERLR_ROW)
#undef LAYERLR_ROW
  };
  return all[direction]();
}

/// Blocks take items until none is left.
const char* launch_items(const StepArgs& args, Phase phase, int device, void* stream) {
  if (!args.items) return nullptr;
  StepArgs now = args;
  now.phase = phase;
  const Kernel kernel = kernels_for(args.direction).step[args.family];
  int blocks = args.blocks;
  const char* error = select_device(device);
  if (!error && !blocks) error = room_for(kernel, device, &blocks);
  if (error) return error;
  return launch(kernel, std::min(blocks, args.items), block_threads, now, stream);
}

const char* step(const StepArgs& args, int device, void* stream) {
  return launch_items(args, whole_step, device, stream);
}

const char* measure(const StepArgs& args, int device, void* stream) {
  return launch_items(args, first_pass, device, stream);
}

const char* apply(const StepArgs& args, int device, void* stream) {
  const char* error = select_device(device);
  if (!error && args.measured) {
    constexpr int threads = 32;
    const int grid = (args.layers + threads - 1) / threads;
    error = launch(kernels_for(args.direction).decide, grid, threads, args, stream);
  }
  return error ? error : launch_items(args, second_pass, device, stream);
}

#if defined(LAYERLR_SIMT)

const char* info(int, DeviceInfo* answer) {
  *answer = {4, tile_elements};
  return nullptr;
}

const char* upload(void* to, const void* from, size_t bytes, int, void*) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

bool capturing(void*) { return false; }

#else

const char* info(int device, DeviceInfo* answer) {
  answer->tile_elements = tile_elements;
  int driver = 0;
  const char* const error = outcome(cudaDriverGetVersion(&driver));
  if (error) return error;
  if (most > 4096 && driver < 12010) return "the driver is older than 530, which has CUDA 12.1";
  return outcome(
      cudaDeviceGetAttribute(&answer->multiprocessors, cudaDevAttrMultiProcessorCount, device));
}

template <int room>
const char* upload_part(char* to, const char* from, int bytes, void* stream) {
  Payload<room> payload;
  std::memcpy(payload.bytes, from, bytes);
  void* arguments[] = {&to, &payload, &bytes};
  const void* const kernel = reinterpret_cast<const void*>(upload_kernel<room>);
  return outcome(cudaLaunchKernel(kernel, 1, std::min(1024, room / 4), arguments, 0,
                                  static_cast<cudaStream_t>(stream)));
}

/// The bytes travel as arguments of a kernel: in stream order, without pinned memory or a wait.
const char* upload(void* to, const void* from, size_t bytes, int device, void* stream) {
  const char* error = select_device(device);
  for (size_t done = 0; done < bytes && !error; done += most) {
    const int part = static_cast<int>(std::min<size_t>(bytes - done, most));
    char* const at = static_cast<char*>(to) + done;
    const char* const of = static_cast<const char*>(from) + done;
    error = part <= little ? upload_part<little>(at, of, part, stream)
                           : upload_part<most>(at, of, part, stream);
  }
  return error;
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

#endif

}  // namespace

const Engine& cuda_engine() {
  static const Engine engine{info, step, measure, apply, upload, capturing};
  return engine;
}

}  // namespace layerlr
