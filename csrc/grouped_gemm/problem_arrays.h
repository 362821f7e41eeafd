// Per-expert problem sizes, pointers and leading dimensions in device memory, as CUTLASS's grouped kernels read them.
#pragma once

#include "grouped_gemm_kernels.h"

namespace moe_ext {

struct ProblemSize {
  int rows, columns, depth;
};

struct ProblemArrays {
  ProblemSize* sizes;
  const void** a;
  const void** b;
  void** d;
  int64_t* lda;
  int64_t* ldb;
  int64_t* ldd;
  void* kernel_workspace;
};

constexpr size_t kArrayAlignment = 128;
// Tensor maps of a persistent sm_90 kernel: a few of 128 bytes per multiprocessor. Checked before each launch.
constexpr size_t kCutlassWorkspaceBytes = 1 << 20;

inline size_t aligned_bytes(size_t bytes) { return (bytes + kArrayAlignment - 1) / kArrayAlignment * kArrayAlignment; }

inline size_t problem_array_bytes(int64_t groups) {
  return aligned_bytes(groups * sizeof(ProblemSize)) + 6 * aligned_bytes(groups * sizeof(int64_t));
}

inline ProblemArrays place_problem_arrays(void* workspace, int64_t groups) {
  char* next = static_cast<char*>(workspace);
  const auto take = [&](size_t bytes) {
    char* here = next;
    next += aligned_bytes(bytes);
    return static_cast<void*>(here);
  };
  ProblemArrays arrays{};
  arrays.sizes = static_cast<ProblemSize*>(take(groups * sizeof(ProblemSize)));
  arrays.a = static_cast<const void**>(take(groups * sizeof(void*)));
  arrays.b = static_cast<const void**>(take(groups * sizeof(void*)));
  arrays.d = static_cast<void**>(take(groups * sizeof(void*)));
  arrays.lda = static_cast<int64_t*>(take(groups * sizeof(int64_t)));
  arrays.ldb = static_cast<int64_t*>(take(groups * sizeof(int64_t)));
  arrays.ldd = static_cast<int64_t*>(take(groups * sizeof(int64_t)));
  arrays.kernel_workspace = next;
  return arrays;
}

// Which operand advances with the expert's rows, and which with the expert itself.
enum class Product { kForwardENK, kForwardEKN, kWgrad };

// Fills the arrays on `stream`. forward: a = input, b = weight, d = output. wgrad: d = a^T b per expert, where a has
// width n and b has width k.
void fill_problem_arrays(const ProblemArrays& arrays, Product product, const void* a, const void* b, void* d,
                         int element_bytes, int output_bytes, const int32_t* expert_offsets,
                         const bool* trainable_experts, int64_t groups, int64_t max_rows, int64_t n, int64_t k,
                         cudaStream_t stream);

}  // namespace moe_ext
