// Compiled with -march=x86-64-v4.
#define MOE_ISA avx512
#define MOE_VECTOR_BYTES 64
#define MOE_STRIP_ROWS 14
#include "gemm_kernels_impl.h"
