// The kernels of some directions: setup.py compiles this file once for each header in directions/.
#include "cuda/kernels.cuh"

namespace layerlr {
#define LAYERLR_INSTANTIATE(D) template DirectionKernels kernels_of<D>();
LAYERLR_KERNELS_OF(LAYERLR_INSTANTIATE)
}  // namespace layerlr
