// Factors of a CPU product as they lie in memory.
#pragma once

#include "../common/dtypes.h"
#include "../common/row_maps.h"
#include "../common/tensors.h"
#include "weight_layout.h"

namespace moe_ext::cpu {

// Which line of memory each line of a factor is: permuted_to_slot, whose entries are token * topk + choice. Slots
// outside [0, num_slots) are lines of zeros.
struct Gather {
  const int32_t* slots = nullptr;  // or null: lines as they lie
  int64_t topk = 1;
  int64_t num_slots = 0;

  bool holds(int64_t line) const { return slots[line] >= 0 && slots[line] < num_slots; }
};

inline Gather gather_of(const Tensor& permuted_to_slot, int64_t first_row, const RowMaps& maps) {
  return {permuted_to_slot.const_data_ptr<int32_t>() + first_row, maps.topk, maps.num_slots};
}

// A line is a row or a column whose elements are adjacent in memory; a gather is over lines.
struct Matrix {
  const char* data;
  int64_t rows;
  int64_t cols;
  int64_t line_stride;  // elements
  bool lines_are_rows;
  Gather gather = {};
};

inline Matrix row_major(const void* data, int64_t rows, int64_t cols, Gather gather = {}) {
  return {static_cast<const char*>(data), rows, cols, cols, true, gather};
}

inline Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.cols, matrix.rows, matrix.line_stride, !matrix.lines_are_rows, matrix.gather};
}

// Expert weights whose rows or columns are adjacent in memory: the tensor itself, unless neither are.
inline Tensor with_adjacent_elements(const Tensor& weight) {
  return weight.stride(1) == 1 || weight.stride(2) == 1 ? weight : as_contiguous(weight);
}

// What multiplies rows from the right: [K, N] of one expert, for a weight with adjacent elements. Weights keep their
// strides: a transposed or sliced tensor of weights is multiplied in place, without a copy.
inline Matrix expert_factor(const Tensor& weight, int64_t expert, WeightLayout layout) {
  const bool rows_adjacent = weight.stride(2) == 1;
  const auto bytes = static_cast<int64_t>(weight.element_size());
  const Matrix stored = {static_cast<const char*>(weight.const_data_ptr()) + expert * weight.stride(0) * bytes,
                         weight.size(1), weight.size(2), weight.stride(rows_adjacent ? 1 : 2), rows_adjacent};
  return layout == WeightLayout::kENK ? transposed(stored) : stored;
}

}  // namespace moe_ext::cpu
