// Many dense products of different sizes at once on the CPU.
//
// The products are cut into tiles whose sizes depend on the products alone; threads take tiles from a queue, the
// largest first, and each tile is a packed GEMM on one thread (cpu/gemm_kernels.h). So the result is bitwise the same
// for any number of threads, one product or hundreds keep every core busy, and a skewed routing costs nothing extra.
// Products of a few rows (decoding) are not packed: each weight is read from memory once, at the speed of memory.
//
// Its own kernels, not the GEMM that torch carries: that one packs an expert's weights as if thousands of rows were to
// follow, reads gathered rows only from a copy, and has no fast path for float16 or for float32 gradients of bfloat16
// factors.
#pragma once

#include <vector>

#include "../common/dtypes.h"
#include "../common/row_maps.h"

namespace moe_ext::cpu {

// Which line of memory (row of a row-major factor) each line of a factor is: permuted_to_slot, whose entries are
// token * topk + choice. Slots outside [0, num_slots) are lines of zeros.
struct Gather {
  const int32_t* slots = nullptr;  // or null: lines as they lie
  int64_t topk = 1;
  int64_t num_slots = 0;
};

inline Gather gather_of(const Tensor& permuted_to_slot, int64_t first_row, const RowMaps& maps) {
  return {permuted_to_slot.const_data_ptr<int32_t>() + first_row, maps.topk, maps.num_slots};
}

// A factor in memory; strides count elements and one of them is 1. A gather is along the other dimension.
struct Matrix {
  const char* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
  Gather gather = {};
};

inline Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.cols, matrix.rows, matrix.col_stride, matrix.row_stride, matrix.gather};
}

// Expert weights whose rows or columns are adjacent in memory: the tensor itself, unless neither are.
inline Tensor with_adjacent_elements(const Tensor& weight) {
  return weight.stride(1) == 1 || weight.stride(2) == 1 ? weight : torch::stable::contiguous(weight);
}

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
