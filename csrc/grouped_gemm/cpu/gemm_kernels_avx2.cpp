// Compiled with -march=x86-64-v3.
#define MOE_ISA avx2
#define MOE_VECTOR_BYTES 32
#define MOE_STRIP_ROWS 6
#include "gemm_kernels_impl.h"
