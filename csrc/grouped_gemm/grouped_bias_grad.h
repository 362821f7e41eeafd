// grouped_bias_grad: the gradient of grouped_gemm to its bias: for each expert, the sum of its rows, in row order, in
// fp32; exact zeros for an expert without rows.
#pragma once

#include "grouped_gemm_wgrad.h"
#include "groups.h"

namespace moe_ext {

struct GroupedBiasShape {
  int64_t num_rows;      // M
  int64_t num_experts;   // E
  int64_t out_features;  // N
  ScalarType out_dtype;
};

inline GroupedBiasShape check_grouped_bias_grad(const Tensor& grad_output, const Tensor& expert_offsets,
                                                const std::optional<ScalarType>& out_dtype) {
  check_tensor(grad_output, "grad_output", {MOE_FLOATING}, 2, "[num_rows, out_features]");
  check_fits_int32(grad_output.size(0), "grad_output, number of rows");
  const int64_t num_experts = check_expert_offsets(expert_offsets, grad_output, "grad_output");
  return {grad_output.size(0), num_experts, grad_output.size(1),
          check_grad_dtype(out_dtype, grad_output, "grad_output")};
}

#define MOE_DECLARE_GROUPED_BIAS_GRAD                                               \
  Tensor grouped_bias_grad(const Tensor& grad_output, const Tensor& expert_offsets, \
                           std::optional<ScalarType> out_dtype);
namespace cpu {
MOE_DECLARE_GROUPED_BIAS_GRAD
// The sum behind it, also for rows still in token order: row m of the sum is topk_weights[slot] * rows[slot / topk]
// with slot = permuted_to_slot[m], nothing for a row without slot; topk_weights absent counts as ones.
Tensor sum_rows_by_expert(const Tensor& rows, const Tensor& expert_offsets,
                          const std::optional<Tensor>& permuted_to_slot, const std::optional<Tensor>& topk_weights,
                          int64_t topk, ScalarType out_dtype);
}  // namespace cpu
namespace cuda {
MOE_DECLARE_GROUPED_BIAS_GRAD
}
#undef MOE_DECLARE_GROUPED_BIAS_GRAD

}  // namespace moe_ext
