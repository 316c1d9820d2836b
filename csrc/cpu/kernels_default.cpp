#define LAYERLR_ISA kernels_default
#include "cpu/kernels.inc"
