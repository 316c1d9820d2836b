#include "cuda/loader.h"

#include <dlfcn.h>

#include <stdexcept>

namespace layerlr {

const Library& open_library(const std::string& path) {
  // Local: torch has a CUDA runtime of its own, and neither must get hold of the other's calls.
  void* const opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!opened) throw std::runtime_error(std::string(dlerror()) + "; install layerlr again");
  void* const function = dlsym(opened, "layerlr_cuda_library");
  if (!function) {
    throw std::runtime_error(path + " is no library of layerlr's kernels; install layerlr again");
  }
  const Library* const library = reinterpret_cast<const Library* (*)()>(function)();
  if (std::string(library->layout) != LAYERLR_LAYOUT) {
    throw std::runtime_error(path + " is of layerlr " + library->layout +
                             ", layerlr._C is of " LAYERLR_LAYOUT "; install layerlr again");
  }
  return *library;
}

}  // namespace layerlr
