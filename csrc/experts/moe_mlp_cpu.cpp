#include "moe_mlp.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/huge_pages.h"
#include "../common/tensors.h"
#include "expert_pipeline.h"
#include "up_projection.h"

namespace moe_ext::cpu {

// Per expert: gather, up projection and activation (first stage), down projection (second stage) to rows in expert
// order; then every token sums its rows. The activations of three experts or so are all that exists of [M, I].
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
  const WeightLayout layout = check_weight_layout(weight_layout);
  const Tensor tokens = as_contiguous(input), slots = as_contiguous(permuted_to_slot);
  const Tensor gate_up = with_adjacent_elements(gate_up_weight), down = with_adjacent_elements(down_weight);
  const std::optional<Tensor> up_bias = as_contiguous(gate_up_bias), out_bias = as_contiguous(down_bias);
  const int64_t num_rows = shape.maps.num_rows, width = shape.gate_up_width;
  const int64_t inner = shape.intermediate_size, hidden = shape.hidden_size;
  const auto size = static_cast<int64_t>(input.element_size());
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, num_rows);
  const std::vector<Group> groups = largest_first(boundaries);
  const UpProjection up(input.scalar_type(), shape.activation, width);
  const GemmKernels& kernels = up.kernels;
  const auto num_groups = static_cast<int64_t>(groups.size());

  Tensor pre_activation = new_empty_large(input, {save_pre_activation ? num_rows : 0, width});
  Tensor rows = new_empty_large(input, {num_rows, hidden});
  const auto bytes_of = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const char*>(tensor->const_data_ptr()) : nullptr;
  };
  const auto clear_rows_of_no_expert = [&](Tensor& tensor, int64_t columns) {
    auto* data = static_cast<char*>(tensor.mutable_data_ptr());
    std::memset(data, 0, boundaries.front() * columns * size);
    std::memset(data + boundaries.back() * columns * size, 0, (num_rows - boundaries.back()) * columns * size);
  };
  clear_rows_of_no_expert(rows, hidden);
  if (save_pre_activation) clear_rows_of_no_expert(pre_activation, width);

  const char* x = static_cast<const char*>(tokens.const_data_ptr());
  const auto up_product = [&](const Group& group) {
    return up.product(row_major(x, group.rows, hidden, gather_of(slots, group.begin, shape.maps)),
                      expert_factor(gate_up, group.expert, layout));
  };
  const auto down_product = [&](const Group& group, const char* activated_rows) {
    return Product{row_major(activated_rows, group.rows, inner), expert_factor(down, group.expert, layout)};
  };
  const auto up_grid = [&](const Group& group) { return TileGrid(up_product(group), num_groups, kernels); };
  const ExpertPipeline pipeline(groups, groups.empty() ? 0 : up_grid(groups.back()).count());
  Tensor activated = new_empty_large(input, {pipeline.num_rows(), inner});

  const char *added_up = bytes_of(up_bias), *added_out = bytes_of(out_bias);
  char* kept = save_pre_activation ? static_cast<char*>(pre_activation.mutable_data_ptr()) : nullptr;
  char *hot = static_cast<char*>(activated.mutable_data_ptr()), *out = static_cast<char*>(rows.mutable_data_ptr());

  enum Stage { kUp, kDown };
  TileQueue queue;
  pipeline.fill(
      queue,
      [&](int64_t index, TileQueue::Counter waits, TileQueue::Counter done) {
        queue.add(kUp, static_cast<int32_t>(index), up_grid(groups[index]), waits, done);
      },
      [&](int64_t index, TileQueue::Counter waits, TileQueue::Counter done) {
        const TileGrid grid(down_product(groups[index], nullptr), num_groups, kernels);
        queue.add(kDown, static_cast<int32_t>(index), grid, waits, done);
      });
  queue.run(num_rows * hidden * (width + inner), [&](const TileQueue::Task& task) {
    const Group& group = groups[task.group];
    const Tile& tile = task.tile;
    char* activated_rows = hot + pipeline.buffer_row(task.group) * inner * size;
    if (task.kind == kUp) {
      up.run(up_product(group), added_up ? added_up + group.expert * width * size : nullptr,
             kept ? kept + group.begin * width * size : nullptr, activated_rows, tile);
      return;
    }
    const char* bias = added_out ? added_out + group.expert * hidden * size : nullptr;
    multiply_tile(down_product(group, activated_rows), tile, kernels, Output{out + group.begin * hidden * size, bias});
  });
  return {unpermute(rows, permuted_to_slot, slot_to_permuted, topk_weights, topk), pre_activation};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&moe_ext::cpu::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_ext::cpu::moe_mlp_backward));
}
