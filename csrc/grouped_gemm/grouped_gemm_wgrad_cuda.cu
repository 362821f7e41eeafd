// grouped_gemm_wgrad on CUDA: one launch over all experts, which gathers where it can (fused_gemm.h); else a gather
// before it.
// Traffic beside the product: a gather of its own reads and writes M*K elements.
#include "grouped_gemm_wgrad.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../common/tensors.h"
#include "../permutation/permute.h"
#include "launch_arguments.h"

namespace moe_ext::cuda {

Tensor grouped_gemm_wgrad(const Tensor& input, const Tensor& grad_output, const Tensor& expert_offsets,
                          std::string weight_layout, const std::optional<Tensor>& permuted_to_slot,
                          const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                          std::optional<ScalarType> out_dtype, const std::optional<Tensor>& trainable_experts) {
  const GroupedWgradShape shape =
      check_grouped_gemm_wgrad(input, grad_output, expert_offsets, weight_layout, permuted_to_slot, slot_to_permuted,
                               topk, out_dtype, trainable_experts);
  const GemmDtype dtype = gemm_dtype(input, "input");
  const DeviceGuard guard(input.get_device_index());
  const Tensor source = as_contiguous(input);
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor offsets = as_contiguous(expert_offsets);
  const std::optional<Tensor> trainable = as_contiguous(trainable_experts);
  const bool enk = shape.layout == WeightLayout::kENK;
  Tensor grad_weight = make_tensor(
      input,
      {shape.num_experts, enk ? shape.out_features : shape.in_features, enk ? shape.in_features : shape.out_features},
      shape.out_dtype);
  GroupedWgradArgs args = {nullptr,
                           gradient.const_data_ptr(),
                           grad_weight.mutable_data_ptr(),
                           offsets.const_data_ptr<int32_t>(),
                           trainable ? trainable->const_data_ptr<bool>() : nullptr,
                           shape.num_experts,
                           shape.num_rows,
                           shape.out_features,
                           shape.in_features,
                           shape.layout,
                           dtype,
                           shape.out_dtype == ScalarType::Float,
                           nullptr,
                           input.get_device_index(),
                           current_stream(input)};
  if (shape.gather) {
    const Tensor slots = as_contiguous(*permuted_to_slot);
    const RowGather gather = row_gather(source, slots, *shape.gather);
    if (fuses(args, gather)) {
      check_launched("grouped_gemm_wgrad", launch_gathered_wgrad(args, gather));
      return grad_weight;
    }
  }
  const Tensor rows = shape.gather ? permute(source, *permuted_to_slot, *slot_to_permuted, topk) : source;
  const Workspace workspace(input, shape.num_experts);
  args.input = rows.const_data_ptr();
  args.workspace = workspace.start;
  check_launched("grouped_gemm_wgrad", launch_grouped_gemm_wgrad(args));
  return grad_weight;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&moe_ext::cuda::grouped_gemm_wgrad));
}
