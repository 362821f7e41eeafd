// grouped_gemm: for each expert e, output[rows of e] = activation(input[rows of e] @ W_e + bias_e).
// Rows of no expert (the tail) are zero. With a gather, input is in token order and row m of the product is
// input[permuted_to_slot[m] / topk], zeros for -1.
#pragma once

#include <tuple>

#include "../experts/activation.h"
#include "groups.h"

namespace moe_ext {

struct GroupedGemmShape {
  int64_t num_rows;      // M
  int64_t num_experts;   // E
  int64_t in_features;   // K
  int64_t out_features;  // N, before the activation
  WeightLayout layout;
  std::optional<RowMaps> gather;
  ActivationSpec activation;
};

inline GroupedGemmShape check_grouped_gemm(const Tensor& input, const Tensor& weight, const Tensor& expert_offsets,
                                           const std::string& weight_layout, const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& permuted_to_slot,
                                           const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                                           const std::string& activation, const std::string& gate_up_layout,
                                           double activation_alpha, double activation_limit) {
  GroupedGemmShape shape;
  shape.gather = check_gather(input, permuted_to_slot, slot_to_permuted, topk);
  shape.num_rows = shape.gather ? shape.gather->num_rows : input.size(0);
  shape.num_experts = check_expert_offsets(expert_offsets, input, "input");
  shape.in_features = input.size(1);
  shape.layout = check_weight_layout(weight_layout);
  const bool enk = shape.layout == WeightLayout::kENK;
  check_tensor(weight, "weight", {input.scalar_type()}, 3,
               enk ? "[num_experts, out_features, in_features]" : "[num_experts, in_features, out_features]");
  check_size(weight, "weight", 0, shape.num_experts, "num_experts, the length of expert_offsets - 1");
  check_size(weight, "weight", enk ? 2 : 1, shape.in_features,
             enk ? "in_features, as in input, for layout enk" : "in_features, as in input, for layout ekn");
  check_same_device(weight, "weight", input, "input");
  shape.out_features = weight.size(enk ? 1 : 2);
  if (bias.has_value()) {
    check_tensor(*bias, "bias", {input.scalar_type()}, 2, "[num_experts, out_features]");
    check_size(*bias, "bias", 0, shape.num_experts, "num_experts");
    check_size(*bias, "bias", 1, shape.out_features, "out_features, as in weight");
    check_same_device(*bias, "bias", input, "input");
  }
  shape.activation =
      check_activation(activation, gate_up_layout, activation_alpha, activation_limit, true, shape.out_features);
  return shape;
}

#define MOE_DECLARE_GROUPED_GEMM                                                                                       \
  std::tuple<Tensor, Tensor> grouped_gemm(                                                                             \
      const Tensor& input, const Tensor& weight, const Tensor& expert_offsets, std::string weight_layout,              \
      const std::optional<Tensor>& bias, const std::optional<Tensor>& permuted_to_slot,                                \
      const std::optional<Tensor>& slot_to_permuted, int64_t topk, std::string activation, std::string gate_up_layout, \
      double activation_alpha, double activation_limit, bool save_pre_activation);
namespace cpu {
MOE_DECLARE_GROUPED_GEMM
}
namespace cuda {
MOE_DECLARE_GROUPED_GEMM
}
#undef MOE_DECLARE_GROUPED_GEMM

}  // namespace moe_ext
