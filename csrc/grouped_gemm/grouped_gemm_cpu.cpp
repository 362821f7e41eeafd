#include "grouped_gemm.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/huge_pages.h"
#include "../common/tensors.h"
#include "../experts/up_projection.h"
#include "cpu/tile_queue.h"
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
  const Tensor rows = as_contiguous(input);
  const std::optional<Tensor> slots = as_contiguous(permuted_to_slot);
  const std::optional<Tensor> biases = as_contiguous(bias);
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, shape.num_rows);
  const auto size = static_cast<int64_t>(input.element_size());
  const int64_t inner = shape.in_features, width = shape.out_features;
  const int64_t output_width = shape.activation.output_width(width);
  const bool keep = save_pre_activation && shape.activation.kind != Activation::kNone;
  const Tensor stored = with_adjacent_elements(weight);
  Tensor output = new_empty_large(input, {shape.num_rows, output_width});
  Tensor pre_activation = new_empty_large(input, {keep ? shape.num_rows : 0, width});
  auto* out = static_cast<char*>(output.mutable_data_ptr());
  auto* kept = keep ? static_cast<char*>(pre_activation.mutable_data_ptr()) : nullptr;
  const auto clear_rows_of_no_expert = [&](char* data, int64_t columns) {
    std::memset(data, 0, boundaries.front() * columns * size);
    std::memset(data + boundaries.back() * columns * size, 0, (shape.num_rows - boundaries.back()) * columns * size);
  };
  clear_rows_of_no_expert(out, output_width);
  if (kept) clear_rows_of_no_expert(kept, width);

  const char* source = static_cast<const char*>(rows.const_data_ptr());
  const char* added = biases ? static_cast<const char*>(biases->const_data_ptr()) : nullptr;
  const std::vector<Group> groups = largest_first(boundaries);
  const auto tokens_of = [&](const Group& group) {
    Matrix tokens = row_major(source + (shape.gather ? 0 : group.begin * inner * size), group.rows, inner);
    if (shape.gather) tokens.gather = gather_of(*slots, group.begin, *shape.gather);
    return tokens;
  };
  const auto bias_of = [&](const Group& group) { return added ? added + group.expert * width * size : nullptr; };

  if (shape.activation.kind == Activation::kNone) {
    std::vector<GemmProblem> problems;
    for (const Group& group : groups) {
      problems.push_back({tokens_of(group), expert_factor(stored, group.expert, shape.layout),
                          out + group.begin * width * size, bias_of(group)});
    }
    tiled_gemm(problems, input.scalar_type(), input.scalar_type());
    return {output, make_tensor(input, {0, width})};
  }
  const UpProjection up(input.scalar_type(), shape.activation, width);
  const auto product_of = [&](const Group& group) {
    return up.product(tokens_of(group), expert_factor(stored, group.expert, shape.layout));
  };
  TileQueue queue;
  for (size_t i = 0; i < groups.size(); ++i) {
    const TileGrid grid(product_of(groups[i]), static_cast<int64_t>(groups.size()), up.kernels);
    queue.add(0, static_cast<int32_t>(i), grid, TileQueue::kNone, TileQueue::kNone);
  }
  queue.run(shape.num_rows * inner * width, [&](const TileQueue::Task& task) {
    const Group& group = groups[task.group];
    up.run(product_of(group), bias_of(group), kept ? kept + group.begin * width * size : nullptr,
           out + group.begin * output_width * size, task.tile);
  });
  return {output, pre_activation};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&moe_ext::cpu::grouped_gemm)); }
