#include "cuda/kernels.cuh"

namespace layerlr {
template DirectionKernels kernels_of<RmspropCentered>();
template DirectionKernels kernels_of<RmspropMomentum>();
template DirectionKernels kernels_of<RmspropCenteredMomentum>();
}  // namespace layerlr
