// grouped_gemm_wgrad: the gradient of grouped_gemm to its weights. For each expert e, over its own rows,
// grad_output^T @ input ([N, K], layout enk) or input^T @ grad_output ([K, N], layout ekn); exact zeros for an expert
// without rows, or that trainable_experts leaves out. `input` may be gathered as in grouped_gemm.
#pragma once

#include "groups.h"

namespace moe_ext {

struct GroupedWgradShape {
  int64_t num_rows;      // M
  int64_t num_experts;   // E
  int64_t in_features;   // K
  int64_t out_features;  // N
  WeightLayout layout;
  std::optional<RowMaps> gather;
  ScalarType out_dtype;
};

// The dtype of a gradient that is accumulated in fp32: that of `source`, or fp32.
inline ScalarType check_grad_dtype(const std::optional<ScalarType>& out_dtype, const Tensor& source,
                                   const char* source_name) {
  const ScalarType dtype = out_dtype.value_or(source.scalar_type());
  MOE_CHECK(dtype == source.scalar_type() || (dtype == ScalarType::Float && source.scalar_type() != ScalarType::Double),
            "out_dtype: expected ", dtype_name(source.scalar_type()), ", the dtype of ", source_name,
            source.scalar_type() == ScalarType::Double ? "" : ", or float32", ", got ", dtype_name(dtype));
  return dtype;
}

inline GroupedWgradShape check_grouped_gemm_wgrad(const Tensor& input, const Tensor& grad_output,
                                                  const Tensor& expert_offsets, const std::string& weight_layout,
                                                  const std::optional<Tensor>& permuted_to_slot,
                                                  const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                                                  const std::optional<ScalarType>& out_dtype,
                                                  const std::optional<Tensor>& trainable_experts) {
  GroupedWgradShape shape;
  shape.gather = check_gather(input, permuted_to_slot, slot_to_permuted, topk);
  shape.num_rows = shape.gather ? shape.gather->num_rows : input.size(0);
  shape.num_experts = check_expert_offsets(expert_offsets, input, "input");
  check_trainable_experts(trainable_experts, shape.num_experts, input, "input");
  check_tensor(grad_output, "grad_output", {input.scalar_type()}, 2, "[num_rows, out_features]");
  check_size(grad_output, "grad_output", 0, shape.num_rows,
             shape.gather ? "num_rows, the length of permuted_to_slot" : "num_rows, as in input");
  check_same_device(grad_output, "grad_output", input, "input");
  shape.in_features = input.size(1);
  shape.out_features = grad_output.size(1);
  shape.layout = check_weight_layout(weight_layout);
  shape.out_dtype = check_grad_dtype(out_dtype, input, "input");
  return shape;
}

#define MOE_DECLARE_GROUPED_GEMM_WGRAD                                                                    \
  Tensor grouped_gemm_wgrad(const Tensor& input, const Tensor& grad_output, const Tensor& expert_offsets, \
                            std::string weight_layout, const std::optional<Tensor>& permuted_to_slot,     \
                            const std::optional<Tensor>& slot_to_permuted, int64_t topk,                  \
                            std::optional<ScalarType> out_dtype, const std::optional<Tensor>& trainable_experts);
namespace cpu {
MOE_DECLARE_GROUPED_GEMM_WGRAD
}
namespace cuda {
MOE_DECLARE_GROUPED_GEMM_WGRAD
}
#undef MOE_DECLARE_GROUPED_GEMM_WGRAD

}  // namespace moe_ext
