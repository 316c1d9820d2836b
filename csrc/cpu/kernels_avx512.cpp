#define LAYERLR_ISA Isa::avx512
#include "cpu/kernels.inc"
