#include "cuda/kernels.cuh"

namespace layerlr {
template DirectionKernels kernels_of<Lion>();
}  // namespace layerlr
