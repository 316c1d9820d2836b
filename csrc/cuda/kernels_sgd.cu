#include "cuda/kernels.cuh"

namespace layerlr {
template DirectionKernels kernels_of<Sgd>();
template DirectionKernels kernels_of<Momentum>();
}  // namespace layerlr
