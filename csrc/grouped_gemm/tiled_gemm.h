// Many dense products of different sizes at once on the CPU, through the GEMM that torch carries (MKL, oneDNN).
//
// The products are cut into tiles whose sizes depend on the products alone; threads take tiles from a queue, the
// largest first, and each tile is one single-threaded aten::mm. So the result is bitwise the same for any number of
// threads, one product or hundreds keep every core busy, and a skewed routing costs nothing extra. Measured on 2 cores,
// [4096, 2048] x [64, 2048, 2048] in fp32: a loop of mm over experts 390 ms, torch's grouped_mm 315 ms.
#pragma once

#include <vector>

#include "../common/dtypes.h"

namespace moe_ext::cpu {

// A matrix in memory; strides count elements.
struct Matrix {
  char* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
};

inline Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.cols, matrix.rows, matrix.col_stride, matrix.row_stride};
}

// output [rows, cols] = left [rows, inner] @ right [inner, cols] + bias [cols]
struct GemmProblem {
  Matrix left;
  Matrix right;
  Matrix output;
  char* bias = nullptr;  // in the dtype of the factors
};

// `output_dtype` is `dtype`, or float32 for 16-bit factors. Accumulates in fp32 (float64 for float64).
void tiled_gemm(const std::vector<GemmProblem>& problems, ScalarType dtype, ScalarType output_dtype);

}  // namespace moe_ext::cpu
