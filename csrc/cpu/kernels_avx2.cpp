#define LAYERLR_ISA Isa::avx2
#include "cpu/kernels.inc"
