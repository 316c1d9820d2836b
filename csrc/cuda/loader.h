// The way to the GPU kernels, which are in a library of their own.
#pragma once

#include <string>

#include "cuda/engine.h"

namespace layerlr {

/// Open a library of kernels, for as long as the process lives. Throws std::runtime_error where it
/// cannot be opened or has another layout than this code.
const Library& open_library(const std::string& path);

}  // namespace layerlr
