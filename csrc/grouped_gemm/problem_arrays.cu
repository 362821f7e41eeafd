// Fills the problem arrays of the tensor-core kernels from expert_offsets: one thread per expert, 60 bytes written
// each.
#include "problem_arrays.h"

#include "../common/cuda_launch.h"
#include "tile_scheduler.h"

namespace moe_ext {
namespace {

constexpr int kThreads = 128;

struct Operands {
  const char* a;
  const char* b;
  char* d;
  int element_bytes, output_bytes;
  int64_t n, k;
};

__global__ void fill_kernel(ProblemArrays arrays, Product product, Operands operands,
                            const int32_t* __restrict__ expert_offsets, const bool* __restrict__ trainable_experts,
                            int64_t groups, int64_t max_rows) {
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (expert >= groups) return;
  const RowRange range = rows_that_train(expert_offsets, trainable_experts, expert, max_rows);
  const int rows = static_cast<int>(range.end - range.begin);
  const int64_t n = operands.n, k = operands.k;
  if (product == Product::kWgrad) {
    // An empty expert gets no tile; its gradient is zeroed elsewhere.
    arrays.sizes[expert] =
        rows > 0 ? ProblemSize{static_cast<int>(n), static_cast<int>(k), rows} : ProblemSize{0, 0, 0};
    arrays.a[expert] = operands.a + range.begin * n * operands.element_bytes;
    arrays.b[expert] = operands.b + range.begin * k * operands.element_bytes;
    arrays.d[expert] = operands.d + expert * n * k * operands.output_bytes;
    arrays.lda[expert] = n;
    arrays.ldb[expert] = k;
    arrays.ldd[expert] = k;
  } else {
    arrays.sizes[expert] =
        rows > 0 ? ProblemSize{rows, static_cast<int>(n), static_cast<int>(k)} : ProblemSize{0, 0, 0};
    arrays.a[expert] = operands.a + range.begin * k * operands.element_bytes;
    arrays.b[expert] = operands.b + expert * n * k * operands.element_bytes;
    arrays.d[expert] = operands.d + range.begin * n * operands.output_bytes;
    arrays.lda[expert] = k;
    arrays.ldb[expert] = product == Product::kForwardENK ? k : n;
    arrays.ldd[expert] = n;
  }
}

}  // namespace

void fill_problem_arrays(const ProblemArrays& arrays, Product product, const void* a, const void* b, void* d,
                         int element_bytes, int output_bytes, const int32_t* expert_offsets,
                         const bool* trainable_experts, int64_t groups, int64_t max_rows, int64_t n, int64_t k,
                         cudaStream_t stream) {
  const Operands operands{static_cast<const char*>(a),
                          static_cast<const char*>(b),
                          static_cast<char*>(d),
                          element_bytes,
                          output_bytes,
                          n,
                          k};
  launch_kernel(fill_kernel, static_cast<unsigned>(ceil_div(groups, kThreads)), kThreads, 0, stream, arrays, product,
                operands, expert_offsets, trainable_experts, groups, max_rows);
}

}  // namespace moe_ext
