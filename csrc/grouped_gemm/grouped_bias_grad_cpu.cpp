#include "grouped_bias_grad.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/cpu_parallel.h"
#include "../common/tensors.h"

namespace moe_ext::cpu {
namespace {

// Columns summed at a time: accumulators that stay in L1, and enough tasks where one expert holds all the rows.
constexpr int64_t kColumnBlock = 256;

struct Rows {
  const int32_t* slot_of_row;  // null: row m is row m
  int64_t num_slots;
  int64_t topk;
};

template <typename scalar_t, typename out_t>
MOE_CPU_CLONES void sum_columns(const scalar_t* source, const accumulate_t<scalar_t>* weights, const Rows& rows,
                                int64_t begin, int64_t end, int64_t width, int64_t columns, out_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t sums[kColumnBlock] = {};
  for (int64_t row = begin; row < end; ++row) {
    int64_t source_row = row;
    acc_t weight = 1;
    if (rows.slot_of_row) {
      const int64_t slot = rows.slot_of_row[row];
      if (slot < 0 || slot >= rows.num_slots) continue;
      source_row = slot / rows.topk;
      if (weights) weight = weights[slot];
    }
    const scalar_t* values = source + source_row * width;
    for (int64_t c = 0; c < columns; ++c) sums[c] += weight * static_cast<acc_t>(values[c]);
  }
  for (int64_t c = 0; c < columns; ++c) output[c] = static_cast<out_t>(sums[c]);
}

}  // namespace

Tensor sum_rows_by_expert(const Tensor& rows, const Tensor& expert_offsets,
                          const std::optional<Tensor>& permuted_to_slot, const std::optional<Tensor>& topk_weights,
                          int64_t topk, ScalarType out_dtype) {
  const Tensor source = as_contiguous(rows);
  const std::optional<Tensor> slots = as_contiguous(permuted_to_slot);
  const std::optional<Tensor> weights = as_contiguous(topk_weights);
  const int64_t num_rows = slots ? slots->numel() : rows.size(0);
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, num_rows);
  const int64_t num_experts = static_cast<int64_t>(boundaries.size()) - 1, width = rows.size(1);
  Tensor output = make_tensor(rows, {num_experts, width}, out_dtype);
  const int64_t blocks = (width + kColumnBlock - 1) / kColumnBlock;
  const int64_t bytes_per_expert = num_rows * width * static_cast<int64_t>(rows.element_size()) / num_experts;
  dispatch_floating(rows.scalar_type(), "grad_output", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_floating(out_dtype, "out_dtype", [&](auto out_tag) {
      using out_t = typename decltype(out_tag)::type;
      const auto* values = source.const_data_ptr<scalar_t>();
      const auto* weight = weights ? weights->const_data_ptr<accumulate_t<scalar_t>>() : nullptr;
      const Rows maps = {slots ? slots->const_data_ptr<int32_t>() : nullptr, rows.size(0) * topk, topk};
      auto* sums = output.mutable_data_ptr<out_t>();
      parallel_rows(num_experts * blocks, bytes_per_expert / std::max<int64_t>(1, blocks),
                    [&](int64_t first, int64_t last) {
                      for (int64_t item = first; item < last; ++item) {
                        const int64_t expert = item / blocks, column = item % blocks * kColumnBlock;
                        sum_columns(values + column, weight, maps, boundaries[expert], boundaries[expert + 1], width,
                                    std::min(kColumnBlock, width - column), sums + expert * width + column);
                      }
                    });
    });
  });
  return output;
}

Tensor grouped_bias_grad(const Tensor& grad_output, const Tensor& expert_offsets, std::optional<ScalarType> out_dtype) {
  const GroupedBiasShape shape = check_grouped_bias_grad(grad_output, expert_offsets, out_dtype);
  return sum_rows_by_expert(grad_output, expert_offsets, std::nullopt, std::nullopt, 1, shape.out_dtype);
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("grouped_bias_grad", TORCH_BOX(&moe_ext::cpu::grouped_bias_grad)); }
