#define LAYERLR_ISA Isa::any
#include "cpu/kernels.inc"
