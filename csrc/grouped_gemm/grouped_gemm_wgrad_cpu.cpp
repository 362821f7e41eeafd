#include "grouped_gemm_wgrad.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../common/tensors.h"
#include "tiled_gemm.h"

namespace moe_ext::cpu {

Tensor grouped_gemm_wgrad(const Tensor& input, const Tensor& grad_output, const Tensor& expert_offsets,
                          std::string weight_layout, const std::optional<Tensor>& permuted_to_slot,
                          const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                          std::optional<ScalarType> out_dtype, const std::optional<Tensor>& trainable_experts) {
  const GroupedWgradShape shape =
      check_grouped_gemm_wgrad(input, grad_output, expert_offsets, weight_layout, permuted_to_slot, slot_to_permuted,
                               topk, out_dtype, trainable_experts);
  const Tensor rows = as_contiguous(input);
  const std::optional<Tensor> slots = as_contiguous(permuted_to_slot);
  const Tensor gradient = as_contiguous(grad_output);
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, shape.num_rows);
  const std::optional<Tensor> trainable = as_contiguous(trainable_experts);
  const bool* trains = trainable ? trainable->const_data_ptr<bool>() : nullptr;
  const auto has_product = [&](int64_t expert) {
    return boundaries[expert] < boundaries[expert + 1] && (!trains || trains[expert]);
  };
  const bool enk = shape.layout == WeightLayout::kENK;
  // An expert's gradient is left^T @ right, [left_width, right_width].
  const int64_t left_width = enk ? shape.out_features : shape.in_features;
  const int64_t right_width = enk ? shape.in_features : shape.out_features;
  Tensor grad_weight = new_empty_large(input, {shape.num_experts, left_width, right_width}, shape.out_dtype);

  const auto size = static_cast<int64_t>(input.element_size());
  const int64_t expert_bytes = left_width * right_width * static_cast<int64_t>(grad_weight.element_size());
  const auto* source = static_cast<const char*>(rows.const_data_ptr());
  const auto* grads = static_cast<const char*>(gradient.const_data_ptr());
  auto* out = static_cast<char*>(grad_weight.mutable_data_ptr());
  parallel_rows(shape.num_experts, expert_bytes, [&](int64_t first, int64_t last) {
    for (int64_t expert = first; expert < last; ++expert) {
      if (!has_product(expert)) std::memset(out + expert * expert_bytes, 0, expert_bytes);
    }
  });
  std::vector<GemmProblem> problems;
  for (int64_t expert = 0; expert < shape.num_experts && expert_bytes > 0; ++expert) {
    const int64_t begin = boundaries[expert], count = boundaries[expert + 1] - begin;
    if (!has_product(expert)) continue;
    const int64_t in = shape.in_features, width = shape.out_features;
    Matrix tokens = row_major(source + (shape.gather ? 0 : begin * in * size), count, in);
    if (shape.gather) tokens.gather = gather_of(*slots, begin, *shape.gather);
    const Matrix grad = row_major(grads + begin * width * size, count, width);
    problems.push_back({transposed(enk ? grad : tokens), enk ? tokens : grad, out + expert * expert_bytes});
  }
  tiled_gemm(problems, input.scalar_type(), shape.out_dtype);
  return grad_weight;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&moe_ext::cpu::grouped_gemm_wgrad));
}
