// The CUDA engine as a Python module that runs on the CPU: the sources that nvcc compiles.
#include "cuda/bindings.cpp"
#include "cuda/engine.cu"
#include "simt.h"
