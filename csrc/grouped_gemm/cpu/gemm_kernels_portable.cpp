// Compiled with the baseline's flags.
#define MOE_ISA portable
#define MOE_VECTOR_BYTES 16
#define MOE_STRIP_ROWS 6
#include "gemm_kernels_impl.h"
