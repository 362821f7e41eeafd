// moe_mlp and its backward on CUDA, composed of grouped GEMMs and row kernels.
// Launches: on sm_90a in 16 bits two products, which gather and activate, and the weighted sum; backward four products,
//   which gather and differentiate, the sum of dot products, the sum to tokens. Elsewhere gather, product, activation,
//   product, weighted sum; backward two gathers (rows are gathered once for all that read them), four products, the row
//   kernel, the sum to tokens. Bound: the grouped products (tensor cores), or reading the weights when rows are few.
#include "moe_mlp.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../common/tensors.h"
#include "../grouped_gemm/grouped_bias_grad.h"
#include "../grouped_gemm/grouped_gemm.h"
#include "../grouped_gemm/grouped_gemm_wgrad.h"
#include "../permutation/permute.h"
#include "moe_mlp_rows.h"

namespace moe_ext::cuda {

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& input, const Tensor& gate_up_weight, const Tensor& down_weight,
                                   const Tensor& expert_offsets, const Tensor& permuted_to_slot,
                                   const Tensor& slot_to_permuted, const std::optional<Tensor>& topk_weights,
                                   const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                                   int64_t topk, std::string weight_layout, std::string activation,
                                   std::string gate_up_layout, double activation_alpha, double activation_limit,
                                   bool save_pre_activation, const std::optional<Tensor>& trainable_experts) {
  const MlpShape shape = check_moe_mlp(input, gate_up_weight, down_weight, expert_offsets, permuted_to_slot,
                                       slot_to_permuted, topk_weights, gate_up_bias, down_bias, topk, weight_layout,
                                       activation, gate_up_layout, activation_alpha, activation_limit);
  check_trainable_experts(trainable_experts, shape.num_experts, input, "input");
  auto [activated, pre_activation] = grouped_gemm(input, gate_up_weight, expert_offsets, weight_layout, gate_up_bias,
                                                  permuted_to_slot, slot_to_permuted, topk, activation, gate_up_layout,
                                                  activation_alpha, activation_limit, save_pre_activation);
  const Tensor rows =
      std::get<0>(grouped_gemm(activated, down_weight, expert_offsets, weight_layout, down_bias, std::nullopt,
                               std::nullopt, 1, "none", "concatenated", activation_alpha, activation_limit, false));
  return {unpermute(rows, permuted_to_slot, slot_to_permuted, topk_weights, topk), pre_activation};
}

namespace {

// Rows in expert order, or in token order with the maps that gather them.
struct GatheredRows {
  Tensor rows;
  std::optional<Tensor> permuted_to_slot;
  std::optional<Tensor> slot_to_permuted;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& gate_up_weight, const Tensor& down_weight,
    const Tensor& expert_offsets, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
    const std::optional<Tensor>& topk_weights, const std::optional<Tensor>& gate_up_bias,
    const std::optional<Tensor>& down_bias, const Tensor& pre_activation, int64_t topk, std::string weight_layout,
    std::string activation, std::string gate_up_layout, double activation_alpha, double activation_limit,
    std::vector<bool> output_mask, const std::optional<Tensor>& trainable_experts) {
  const MlpShape shape =
      check_moe_mlp_backward(grad_output, input, gate_up_weight, down_weight, expert_offsets, permuted_to_slot,
                             slot_to_permuted, topk_weights, gate_up_bias, down_bias, pre_activation, topk,
                             weight_layout, activation, gate_up_layout, activation_alpha, activation_limit);
  const MlpGradientMask wanted =
      check_mlp_output_mask(output_mask, topk_weights.has_value(), gate_up_bias.has_value(), down_bias.has_value());
  const std::string backward_layout = transposed_layout(weight_layout);
  const auto multiply = [&](const GatheredRows& a, const Tensor& weight) {
    return std::get<0>(grouped_gemm(a.rows, weight, expert_offsets, backward_layout, std::nullopt, a.permuted_to_slot,
                                    a.slot_to_permuted, topk, "none", "concatenated", activation_alpha,
                                    activation_limit, false));
  };
  const Tensor slots = as_contiguous(permuted_to_slot);
  const Tensor gradient = as_contiguous(grad_output);
  const std::optional<Tensor> weights = as_contiguous(topk_weights);
  const std::optional<Tensor> bias = as_contiguous(down_bias);
  const Tensor offsets = as_contiguous(expert_offsets);
  const Tensor rows = as_contiguous(pre_activation);

  const MlpRows mlp_rows = {rows, gradient, offsets, slots, weights, bias, shape.maps, shape.activation};
  const std::optional<MlpRowGradients> fused = fused_mlp_rows_backward(mlp_rows, down_weight, backward_layout);
  const auto gather = [&](const Tensor& tokens) -> GatheredRows {
    if (fused) return {tokens, slots, slot_to_permuted};
    return {permute(tokens, slots, slot_to_permuted, topk), std::nullopt, std::nullopt};
  };
  const GatheredRows grad_rows = gather(gradient);
  const MlpRowGradients row_gradients = fused ? *fused : mlp_rows_backward(mlp_rows, multiply(grad_rows, down_weight));
  const auto empty_like = [&](const Tensor& weight) {
    return make_tensor(weight, {0, weight.size(1), weight.size(2)});
  };
  // The gathered side is wgrad's `input`, so the two factors of the down projection change places.
  const auto weight_gradient = [&](const GatheredRows& a, const Tensor& grad, const std::string& layout) {
    return grouped_gemm_wgrad(a.rows, grad, expert_offsets, layout, a.permuted_to_slot, a.slot_to_permuted, topk,
                              std::nullopt, trainable_experts);
  };
  const Tensor grad_down_weight =
      wanted.down_weight ? weight_gradient(grad_rows, row_gradients.scaled, backward_layout) : empty_like(down_weight);
  const Tensor grad_gate_up_weight =
      wanted.gate_up_weight ? weight_gradient(gather(input), row_gradients.grad_pre_activation, weight_layout)
                            : empty_like(gate_up_weight);
  const Tensor grad_input =
      wanted.input
          ? unpermute(multiply({row_gradients.grad_pre_activation, std::nullopt, std::nullopt}, gate_up_weight), slots,
                      slot_to_permuted, std::nullopt, topk)
          : make_tensor(input, {0, shape.hidden_size});
  const Tensor grad_topk_weights =
      wanted.topk_weights ? row_gradients.grad_topk_weights : make_tensor(row_gradients.grad_topk_weights, {0, topk});
  const Tensor grad_gate_up_bias =
      wanted.gate_up_bias ? grouped_bias_grad(row_gradients.grad_pre_activation, expert_offsets, std::nullopt)
                          : make_tensor(input, {0, shape.gate_up_width});
  const Tensor grad_down_bias = wanted.down_bias ? down_bias_grad(mlp_rows, down_bias->scalar_type())
                                                 : make_tensor(input, {0, shape.hidden_size});
  return {grad_input, grad_gate_up_weight, grad_down_weight, grad_topk_weights, grad_gate_up_bias, grad_down_bias};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("moe_mlp", TORCH_BOX(&moe_ext::cuda::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_ext::cuda::moe_mlp_backward));
}
