#include "grouped_gemm.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/huge_pages.h"
#include "../common/optional_tensor.h"
#include "../experts/expert_activation.h"
#include "tiled_gemm.h"

namespace moe_ext::cpu {

std::tuple<Tensor, Tensor> grouped_gemm(const Tensor& input, const Tensor& weight, const Tensor& expert_offsets,
                                        std::string weight_layout, const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& permuted_to_slot,
                                        const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                                        std::string activation, std::string gate_up_layout, double activation_alpha,
                                        double activation_limit, bool save_pre_activation) {
  const GroupedGemmShape shape =
      check_grouped_gemm(input, weight, expert_offsets, weight_layout, bias, permuted_to_slot, slot_to_permuted, topk,
                         activation, gate_up_layout, activation_alpha, activation_limit);
  const Tensor rows = torch::stable::contiguous(input);
  const std::optional<Tensor> slots = contiguous_if_any(permuted_to_slot);
  const std::optional<Tensor> biases = contiguous_if_any(bias);
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, shape.num_rows);
  const auto size = static_cast<int64_t>(input.element_size());
  const int64_t inner = shape.in_features, width = shape.out_features;
  Tensor product = new_empty_large(input, {shape.num_rows, width});

  auto* out = static_cast<char*>(product.mutable_data_ptr());
  std::memset(out, 0, boundaries.front() * width * size);
  std::memset(out + boundaries.back() * width * size, 0, (shape.num_rows - boundaries.back()) * width * size);
  const Tensor stored = with_adjacent_elements(weight);
  const auto* left = static_cast<const char*>(rows.const_data_ptr());
  const auto* right = static_cast<const char*>(stored.const_data_ptr());
  const auto* added = biases ? static_cast<const char*>(biases->const_data_ptr()) : nullptr;
  std::vector<GemmProblem> problems;
  for (int64_t expert = 0; expert < shape.num_experts; ++expert) {
    const int64_t begin = boundaries[expert], count = boundaries[expert + 1] - begin;
    if (count == 0 || width == 0) continue;
    Matrix tokens = {left + (shape.gather ? 0 : begin * inner * size), count, inner, inner, 1};
    if (shape.gather) tokens.gather = gather_of(*slots, begin, *shape.gather);
    // Weights keep their strides: a transposed or sliced tensor of weights is multiplied in place, without a copy.
    const Matrix factor = {right + expert * stored.stride(0) * size, stored.size(1), stored.size(2), stored.stride(1),
                           stored.stride(2)};
    problems.push_back({tokens, shape.layout == WeightLayout::kENK ? transposed(factor) : factor,
                        out + begin * width * size, added ? added + expert * width * size : nullptr});
  }
  tiled_gemm(problems, input.scalar_type(), input.scalar_type());

  if (shape.activation.kind == Activation::kNone) return {product, torch::stable::new_empty(input, {0, width})};
  Tensor output = activate_rows(product, shape.activation);
  return {output, save_pre_activation ? product : torch::stable::new_empty(input, {0, width})};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&moe_ext::cpu::grouped_gemm)); }
