#define LAYERLR_ISA kernels_avx512
#include "cpu/kernels.inc"
