// grouped_gemm_wgrad on CUDA: gather, then one launch over all experts.
// Traffic beside the product: a gather reads and writes M*K elements.
#include "grouped_gemm_wgrad.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../permutation/permute.h"
#include "launch_arguments.h"

namespace moe_ext::cuda {

Tensor grouped_gemm_wgrad(const Tensor& input, const Tensor& grad_output, const Tensor& expert_offsets,
                          std::string weight_layout, const std::optional<Tensor>& permuted_to_slot,
                          const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                          std::optional<ScalarType> out_dtype) {
  const GroupedWgradShape shape = check_grouped_gemm_wgrad(input, grad_output, expert_offsets, weight_layout,
                                                           permuted_to_slot, slot_to_permuted, topk, out_dtype);
  const GemmDtype dtype = gemm_dtype(input, "input");
  const DeviceGuard guard(input.get_device_index());
  const Tensor rows =
      shape.gather ? permute(input, *permuted_to_slot, *slot_to_permuted, topk) : torch::stable::contiguous(input);
  const Tensor gradient = torch::stable::contiguous(grad_output);
  const Tensor offsets = torch::stable::contiguous(expert_offsets);
  const Workspace workspace(input, shape.num_experts);
  const bool enk = shape.layout == WeightLayout::kENK;
  Tensor grad_weight = torch::stable::new_empty(
      input,
      {shape.num_experts, enk ? shape.out_features : shape.in_features, enk ? shape.in_features : shape.out_features},
      shape.out_dtype);
  check_launched("grouped_gemm_wgrad",
                 launch_grouped_gemm_wgrad({rows.const_data_ptr(), gradient.const_data_ptr(),
                                            grad_weight.mutable_data_ptr(), offsets.const_data_ptr<int32_t>(),
                                            shape.num_experts, shape.num_rows, shape.out_features, shape.in_features,
                                            shape.layout, dtype, shape.out_dtype == ScalarType::Float, workspace.start,
                                            input.get_device_index(), current_stream(input)}));
  return grad_weight;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&moe_ext::cuda::grouped_gemm_wgrad));
}
