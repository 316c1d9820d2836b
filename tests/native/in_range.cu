// The root and the quotient of csrc/core.h, and the compiler's (tests/gpu/test_cuda_build.py).
#include "core.h"

extern "C" {
__global__ void our_root(float* p) { p[0] = layerlr::root_in_range(p[0]); }
__global__ void its_root(float* p) { p[0] = sqrtf(p[0]); }
__global__ void our_quotient(float* p) { p[0] = layerlr::quotient_in_range(p[0], p[1]); }
__global__ void its_quotient(float* p) { p[0] = p[0] / p[1]; }
}
