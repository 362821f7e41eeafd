// In the place of one CUTLASS kernel: its products in plain loops, from the same problem arrays. CUTLASS's own code is
// not run; what fills the arrays, picks the kernel and zeroes what no product writes is.
#pragma once

#include "grouped_gemm/tensor_core_kernels.h"

#include "common/dtypes.h"

// The names that cmake/GroupedGemmKernels.cmake writes.
namespace cutlass {
using bfloat16_t = moe_ext::BFloat16;
using half_t = moe_ext::Half;
}  // namespace cutlass

namespace moe_ext::stand_in {

struct RowMajor {
  static int64_t offset(int64_t row, int64_t column, int64_t leading) { return row * leading + column; }
};
struct ColumnMajor {
  static int64_t offset(int64_t row, int64_t column, int64_t leading) { return column * leading + row; }
};

// CUTLASS moves 16 bytes at a time: start and leading dimension of every matrix that has elements must be aligned.
inline bool aligned(const void* matrix, int64_t leading_bytes) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && leading_bytes % 16 == 0;
}

template <typename Element, typename LayoutA, typename LayoutB, typename Output>
const char* multiply(const TensorCoreProblem& problem) {
  if (reinterpret_cast<uintptr_t>(problem.workspace) % kArrayAlignment != 0) return "unaligned workspace";
  const ProblemArrays arrays = place_problem_arrays(problem.workspace, problem.groups);
  for (int64_t group = 0; group < problem.groups; ++group) {
    const ProblemSize size = arrays.sizes[group];
    if (size.rows == 0 || size.columns == 0) continue;
    const auto* a = static_cast<const Element*>(arrays.a[group]);
    const auto* b = static_cast<const Element*>(arrays.b[group]);
    auto* d = static_cast<Output*>(arrays.d[group]);
    const int64_t lda = arrays.lda[group], ldb = arrays.ldb[group], ldd = arrays.ldd[group];
    if (!aligned(a, lda * sizeof(Element)) || !aligned(b, ldb * sizeof(Element)) || !aligned(d, ldd * sizeof(Output))) {
      return "an unaligned matrix";
    }
    for (int64_t row = 0; row < size.rows; ++row) {
      for (int64_t column = 0; column < size.columns; ++column) {
        float sum = 0.f;
        for (int64_t depth = 0; depth < size.depth; ++depth) {
          sum += static_cast<float>(a[LayoutA::offset(row, depth, lda)]) *
                 static_cast<float>(b[LayoutB::offset(depth, column, ldb)]);
        }
        d[row * ldd + column] = static_cast<Output>(sum);
      }
    }
  }
  return nullptr;
}

}  // namespace moe_ext::stand_in
