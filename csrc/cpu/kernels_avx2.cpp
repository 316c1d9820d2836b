#define LAYERLR_ISA kernels_avx2
#include "cpu/kernels.inc"
