// grouped_gemm where experts hold few rows each, as in decoding: gather, product, bias and activation in one kernel
// that reads the weights of each used expert once and those of the others never.
#pragma once

#include "../../experts/activation.h"
#include "../grouped_gemm_kernels.h"

namespace moe_ext::small_rows {

// Chosen from static shapes alone; the kernel is right for any distribution of the rows. On an H100 a weight of b bytes
// takes b / 3.35 TB/s to read and 2 * rows flops to multiply: at about 600 TFLOP/s of mma.sync the two meet at 180 rows
// of 16-bit weights, at 60 TFLOP/s of fp32 FMA at 36. But rows past a chunk (32; fp32: 8) read the weights again, from
// L2, and two chunks at 5.5 TB/s already take longer than device memory. With 16 rows on average an expert with twice
// as many still is one chunk. An estimate: not yet measured.
constexpr int64_t kMaxAverageRows = 16;
constexpr int64_t kMaxExperts = 1024;  // their prefix sums lie in shared memory

struct Arguments {
  const void* input;                // [max_rows, k]; with a gather [num_slots / topk, k]
  const void* weight;               // [E, n, k] or [E, k, n]
  const void* bias;                 // [E, n], or null
  void* output;                     // [max_rows, n], or [max_rows, n / 2] for a gated activation
  void* pre_activation;             // [max_rows, n], or null
  const int32_t* expert_offsets;    // [E + 1]
  const int32_t* permuted_to_slot;  // [max_rows], or null: no gather
  int64_t num_slots, topk;
  int64_t num_experts, max_rows, n, k;
  WeightLayout layout;
  GemmDtype dtype;
  ActivationSpec activation;
};

// Whether shapes and alignment suit the kernel: 16-byte aligned input and weight, with rows of whole 16-byte vectors.
bool takes(const Arguments& args);
void grouped_gemm(const Arguments& args, int device, cudaStream_t stream);

}  // namespace moe_ext::small_rows
