// The launchers behind grouped_gemm, grouped_gemm_wgrad and grouped_bias_grad on CUDA: plain C++, no torch.
//
// Rows [max_rows, width] are grouped by `expert_offsets` [E + 1], device data: rows of expert e are
// expert_offsets[e] : expert_offsets[e + 1], clamped to [0, max_rows]; an expert whose end lies before its start is
// empty. No launcher synchronises, allocates, or reads device data on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef MOE_EXT_EMULATED
#include "cuda_emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "weight_layout.h"

namespace moe_ext {

enum class GemmDtype { kFloat32, kBFloat16, kFloat16 };

// output[m, :] = input[m, :] @ op(weight[e]); rows before the first expert and past the last become zero.
struct GroupedGemmArgs {
  const void* input;   // [max_rows, k]
  const void* weight;  // [E, n, k] or [E, k, n]
  void* output;        // [max_rows, n]
  const int32_t* expert_offsets;
  int64_t num_experts, max_rows, n, k;
  WeightLayout layout;
  GemmDtype dtype;
  void* workspace;  // grouped_gemm_workspace_bytes(num_experts, device), 128-byte aligned
  int device;
  cudaStream_t stream;
};

// grad_weight[e] = grad_output_e^T @ input_e (ENK) or input_e^T @ grad_output_e (EKN); zero for an empty expert,
// and for one that is not trainable.
struct GroupedWgradArgs {
  const void* input;        // [max_rows, k]
  const void* grad_output;  // [max_rows, n]
  void* grad_weight;        // [E, n, k] or [E, k, n]
  const int32_t* expert_offsets;
  const bool* trainable_experts;  // [E], null for all
  int64_t num_experts, max_rows, n, k;
  WeightLayout layout;
  GemmDtype dtype;
  bool float32_output;  // else the dtype of the inputs
  void* workspace;
  int device;
  cudaStream_t stream;
};

// grad_bias[e, :] = sum of the rows of expert e, in fp32 and in row order; zero for an empty expert.
struct GroupedBiasGradArgs {
  const void* grad_output;  // [max_rows, n]
  void* grad_bias;          // [E, n]
  const int32_t* expert_offsets;
  int64_t num_experts, max_rows, n;
  GemmDtype dtype;
  bool float32_output;
  int device;
  cudaStream_t stream;
};

// Enough for either product with any tile configuration on this device.
size_t grouped_gemm_workspace_bytes(int64_t num_experts, int device);

// nullptr, or what went wrong.
const char* launch_grouped_gemm(const GroupedGemmArgs& args);
const char* launch_grouped_gemm_wgrad(const GroupedWgradArgs& args);
const char* launch_grouped_bias_grad(const GroupedBiasGradArgs& args);

}  // namespace moe_ext
