// Many dense products of different sizes at once on the CPU.
//
// The products are cut into tiles; threads take tiles from a queue, the largest products first, and each tile is a
// packed GEMM on one thread (cpu/multiply_tile.h). Every element is summed in one order, however the products are cut,
// so the result is bitwise the same for any number of threads.
//
// Its own kernels, not the GEMM that torch carries: that one packs an expert's weights as if thousands of rows were to
// follow, reads gathered rows only from a copy, and has no fast path for float16 or for float32 gradients of bfloat16
// factors.
#pragma once

#include <vector>

#include "matrices.h"

namespace moe_ext::cpu {

// output [rows, cols] = left [rows, inner] @ right [inner, cols] + bias [cols]
struct GemmProblem {
  Matrix left;
  Matrix right;
  char* output;                // row-major, contiguous
  const char* bias = nullptr;  // in the dtype of the factors
};

// `output_dtype` is `dtype`, or float32 for 16-bit factors. Accumulates in fp32 (float64 for float64).
void tiled_gemm(const std::vector<GemmProblem>& problems, ScalarType dtype, ScalarType output_dtype);

}  // namespace moe_ext::cpu
