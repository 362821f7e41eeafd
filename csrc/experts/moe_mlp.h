// moe_mlp: the whole expert MLP from tokens to tokens.
//   H = gather(input) @ gate_up + gate_up_bias        the pre-activation, [M, 2I] (gated) or [M, I]
//   output = sum over a token's rows of topk_weight * (activation(H) @ down + down_bias), in fp32
// moe_mlp_backward needs input, H and the plan; nothing else of size [M, ...] is kept. Of experts that
// trainable_experts leaves out it returns zeros for the weights, without a product; their biases' gradients it leaves
// to the caller. On the CPU both are fused (moe_mlp_cpu.cpp, moe_mlp_backward_cpu.cpp); CUDA's are
// composed of grouped GEMMs and row kernels.
#pragma once

#include <tuple>
#include <vector>

#include "../common/output_mask.h"
#include "../grouped_gemm/groups.h"
#include "../permutation/unpermute.h"
#include "activation.h"

namespace moe_ext {

// Which gradients moe_mlp_backward computes: output_mask, in the order of its results. What is not asked for, or has no
// argument, comes back empty and costs no product.
struct MlpGradientMask {
  bool input, gate_up_weight, down_weight, topk_weights, gate_up_bias, down_bias;
};

inline MlpGradientMask check_mlp_output_mask(const std::vector<bool>& output_mask, bool has_topk_weights,
                                             bool has_gate_up_bias, bool has_down_bias) {
  check_output_mask(output_mask, 6);
  return {output_mask[0],
          output_mask[1],
          output_mask[2],
          output_mask[3] && has_topk_weights,
          output_mask[4] && has_gate_up_bias,
          output_mask[5] && has_down_bias};
}

struct MlpShape {
  RowMaps maps;
  int64_t num_experts;        // E
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  int64_t gate_up_width;      // 2I when gated, else I
  ActivationSpec activation;
};

inline MlpShape check_moe_mlp(const Tensor& input, const Tensor& gate_up_weight, const Tensor& down_weight,
                              const Tensor& expert_offsets, const Tensor& permuted_to_slot,
                              const Tensor& slot_to_permuted, const std::optional<Tensor>& topk_weights,
                              const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                              int64_t topk, const std::string& weight_layout, const std::string& activation,
                              const std::string& gate_up_layout, double activation_alpha, double activation_limit) {
  MlpShape shape;
  shape.maps = check_row_maps(permuted_to_slot, slot_to_permuted, topk);
  check_tensor(input, "input", {MOE_FLOATING}, 2, "[num_tokens, hidden_size]");
  check_size(input, "input", 0, shape.maps.num_tokens, "num_tokens, the length of slot_to_permuted / topk");
  check_same_device(permuted_to_slot, "permuted_to_slot", input, "input");
  shape.num_experts = check_expert_offsets(expert_offsets, input, "input");
  shape.hidden_size = input.size(1);
  const bool enk = check_weight_layout(weight_layout) == WeightLayout::kENK;
  const auto check_weight = [&](const Tensor& weight, const char* name, const char* words) {
    check_tensor(weight, name, {input.scalar_type()}, 3, words);
    check_size(weight, name, 0, shape.num_experts, "num_experts, the length of expert_offsets - 1");
    check_same_device(weight, name, input, "input");
  };
  check_weight(
      gate_up_weight, "gate_up_weight",
      enk ? "[num_experts, gate and up columns, hidden_size]" : "[num_experts, hidden_size, gate and up columns]");
  const char* as_in_input =
      enk ? "hidden_size, as in input, for layout enk" : "hidden_size, as in input, for layout ekn";
  check_size(gate_up_weight, "gate_up_weight", enk ? 2 : 1, shape.hidden_size, as_in_input);
  shape.gate_up_width = gate_up_weight.size(enk ? 1 : 2);
  shape.activation =
      check_activation(activation, gate_up_layout, activation_alpha, activation_limit, false, shape.gate_up_width);
  shape.intermediate_size = shape.activation.output_width(shape.gate_up_width);
  check_weight(down_weight, "down_weight",
               enk ? "[num_experts, hidden_size, intermediate_size]" : "[num_experts, intermediate_size, hidden_size]");
  check_size(down_weight, "down_weight", enk ? 1 : 2, shape.hidden_size, as_in_input);
  check_size(down_weight, "down_weight", enk ? 2 : 1, shape.intermediate_size,
             "intermediate_size, from the columns of gate_up_weight and the activation");
  const auto check_bias = [&](const std::optional<Tensor>& bias, const char* name, int64_t width, const char* meaning) {
    if (!bias.has_value()) return;
    check_tensor(*bias, name, {input.scalar_type()}, 2, "[num_experts, width]");
    check_size(*bias, name, 0, shape.num_experts, "num_experts");
    check_size(*bias, name, 1, width, meaning);
    check_same_device(*bias, name, input, "input");
  };
  check_bias(gate_up_bias, "gate_up_bias", shape.gate_up_width, "the gate and up columns of gate_up_weight");
  check_bias(down_bias, "down_bias", shape.hidden_size, "hidden_size, as in input");
  if (topk_weights.has_value()) check_topk_weights(*topk_weights, input, "input", shape.maps);
  return shape;
}

inline MlpShape check_moe_mlp_backward(const Tensor& grad_output, const Tensor& input, const Tensor& gate_up_weight,
                                       const Tensor& down_weight, const Tensor& expert_offsets,
                                       const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                                       const std::optional<Tensor>& topk_weights,
                                       const std::optional<Tensor>& gate_up_bias,
                                       const std::optional<Tensor>& down_bias, const Tensor& pre_activation,
                                       int64_t topk, const std::string& weight_layout, const std::string& activation,
                                       const std::string& gate_up_layout, double activation_alpha,
                                       double activation_limit) {
  const MlpShape shape = check_moe_mlp(input, gate_up_weight, down_weight, expert_offsets, permuted_to_slot,
                                       slot_to_permuted, topk_weights, gate_up_bias, down_bias, topk, weight_layout,
                                       activation, gate_up_layout, activation_alpha, activation_limit);
  check_tensor(grad_output, "grad_output", {input.scalar_type()}, 2, "[num_tokens, hidden_size]");
  check_size(grad_output, "grad_output", 0, shape.maps.num_tokens, "num_tokens");
  check_size(grad_output, "grad_output", 1, shape.hidden_size, "hidden_size, as in input");
  check_same_device(grad_output, "grad_output", input, "input");
  check_tensor(pre_activation, "pre_activation", {input.scalar_type()}, 2, "[num_rows, gate and up columns]");
  check_size(pre_activation, "pre_activation", 0, shape.maps.num_rows,
             "num_rows; moe_mlp returns it with save_pre_activation");
  check_size(pre_activation, "pre_activation", 1, shape.gate_up_width, "the gate and up columns of gate_up_weight");
  check_same_device(pre_activation, "pre_activation", input, "input");
  return shape;
}

#define MOE_DECLARE_MOE_MLP                                                                                          \
  std::tuple<Tensor, Tensor> moe_mlp(                                                                                \
      const Tensor& input, const Tensor& gate_up_weight, const Tensor& down_weight, const Tensor& expert_offsets,    \
      const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, const std::optional<Tensor>& topk_weights,     \
      const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias, int64_t topk,               \
      std::string weight_layout, std::string activation, std::string gate_up_layout, double activation_alpha,        \
      double activation_limit, bool save_pre_activation, const std::optional<Tensor>& trainable_experts);            \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(                                       \
      const Tensor& grad_output, const Tensor& input, const Tensor& gate_up_weight, const Tensor& down_weight,       \
      const Tensor& expert_offsets, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,                  \
      const std::optional<Tensor>& topk_weights, const std::optional<Tensor>& gate_up_bias,                          \
      const std::optional<Tensor>& down_bias, const Tensor& pre_activation, int64_t topk, std::string weight_layout, \
      std::string activation, std::string gate_up_layout, double activation_alpha, double activation_limit,          \
      std::vector<bool> output_mask, const std::optional<Tensor>& trainable_experts);
namespace cpu {
MOE_DECLARE_MOE_MLP
}
namespace cuda {
MOE_DECLARE_MOE_MLP
}
#undef MOE_DECLARE_MOE_MLP

}  // namespace moe_ext
