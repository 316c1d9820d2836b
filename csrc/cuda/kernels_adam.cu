#include "cuda/kernels.cuh"

namespace layerlr {
template DirectionKernels kernels_of<Adam>();
template DirectionKernels kernels_of<AmsGrad>();
}  // namespace layerlr
