// The functions behind engine.h.
#include <algorithm>
#include <cstring>

#include "cuda/kernels.cuh"
#include "cuda/launch.cuh"

namespace layerlr {

#if !defined(LAYERLR_SIMT)
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

/// Launches one after another, up to the first that fails.
struct Launches {
  const StepArgs& args;
  void* stream;
  const DirectionKernels k;
  const char* error;

  Launches(const StepArgs& args, int device, void* stream)
      : args(args), stream(stream), k(kernels_for(args.direction)), error(select_device(device)) {}

  void passes(Phase phase) {
    run(k.step, args.blocks, phase, args.rings.bytes_in_all(), phase == whole_step);
  }
  void run(void (*kernel)(StepArgs), int grid, Phase phase = whole_step, int shared = 0,
           bool together = false) {
    if (error || !grid) return;
    StepArgs now = args;
    now.phase = phase;
    error = launch(kernel, grid, shared, together, now, stream);
  }
};

const char* measure(const StepArgs& args, int device, void* stream) {
  Launches to(args, device, stream);
  to.passes(first_pass);
  to.run(to.k.sum, args.layers);
  return to.error;
}

const char* apply(const StepArgs& args, int device, void* stream) {
  Launches to(args, device, stream);
  if (args.measured) to.run(to.k.decide, args.layers);
  to.passes(second_pass);
  to.run(to.k.finish, args.layers + 1);
  return to.error;
}

const char* step(const StepArgs& args, int device, bool plain, void* stream) {
  if (plain) {
    const char* error = args.measured ? measure(args, device, stream) : nullptr;
    return error ? error : apply(args, device, stream);
  }
  Launches to(args, device, stream);
  to.passes(whole_step);
  return to.error;
}

#if defined(LAYERLR_SIMT)

const char* info(int, DeviceInfo* answer) {
  *answer = {4, tile_threads, 48 * 1024, true};
  return nullptr;
}

const char* upload(void* to, const void* from, size_t bytes, int, void*) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

bool capturing(void*) { return false; }

#else

const char* info(int device, DeviceInfo* answer) {
  int cooperative = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&answer->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&answer->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  }
  answer->tile_threads = tile_threads;
  answer->cooperative = cooperative != 0;
  return outcome(error);
}

/// What a launch can carry along.
struct Payload {
  char bytes[3840];
};

__global__ void upload_kernel(char* to, const Payload payload, int bytes) {
  for (int i = threadIdx.x * 4; i < bytes; i += blockDim.x * 4) {
    *reinterpret_cast<uint32_t*>(to + i) = *reinterpret_cast<const uint32_t*>(payload.bytes + i);
  }
}

/// The bytes travel as arguments of a kernel: in stream order, without pinned memory or a wait.
const char* upload(void* to, const void* from, size_t bytes, int device, void* stream) {
  const char* error = select_device(device);
  for (size_t done = 0; done < bytes && !error; done += sizeof(Payload)) {
    Payload payload;
    const size_t part = std::min(bytes - done, sizeof payload);
    std::memcpy(payload.bytes, static_cast<const char*>(from) + done, part);
    upload_kernel<<<1, 256, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<char*>(to) + done, payload, static_cast<int>(part));
    error = outcome(cudaGetLastError());
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
