// The one function of liblayerlr_cuda.so, which holds the kernels and nothing of torch or Python.
#include "cuda/engine.h"

namespace layerlr {
const Engine& cuda_engine();
}

extern "C" __attribute__((visibility("default"))) const layerlr::Library* layerlr_cuda_library() {
  static const layerlr::Library library{LAYERLR_LAYOUT, LAYERLR_CUDA_ARCH, layerlr::cuda_engine()};
  return &library;
}
