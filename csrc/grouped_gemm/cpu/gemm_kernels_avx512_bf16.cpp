// Compiled with -march=x86-64-v4 -mavx512bf16.
#define MOE_ISA avx512_bf16
#define MOE_VECTOR_BYTES 64
#define MOE_STRIP_ROWS 14
#define MOE_BF16_DOT
#include "gemm_kernels_impl.h"
