#include "cuda/kernels.cuh"

namespace layerlr {
template DirectionKernels kernels_of<Nesterov>();
template DirectionKernels kernels_of<AveragedMomentum>();
}  // namespace layerlr
