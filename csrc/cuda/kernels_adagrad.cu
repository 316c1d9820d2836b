#include "cuda/kernels.cuh"

namespace layerlr {
template DirectionKernels kernels_of<Adagrad>();
template DirectionKernels kernels_of<Rmsprop>();
}  // namespace layerlr
