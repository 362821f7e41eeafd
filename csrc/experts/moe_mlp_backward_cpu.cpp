#include <cstring>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../common/stream_rows.h"
#include "../common/tensors.h"
#include "../grouped_gemm/grouped_bias_grad.h"
#include "down_gradient.h"
#include "expert_pipeline.h"
#include "moe_mlp.h"

namespace moe_ext::cpu {
namespace {

enum Stage : int32_t { kActivation, kDownWeight, kGateUpWeight, kInputRows, kRowSums };

void clear_rows(Tensor& tensor, int64_t first, int64_t last) {
  const int64_t bytes = tensor.size(1) * static_cast<int64_t>(tensor.element_size());
  std::memset(static_cast<char*>(tensor.mutable_data_ptr()) + first * bytes, 0, (last - first) * bytes);
}

char* data_of(Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

// Weight gradients of experts without rows, or that are not trained, are zeros.
void clear_unused_experts(Tensor& gradient, const std::vector<int64_t>& boundaries, const bool* trains) {
  const int64_t bytes = gradient.size(1) * gradient.size(2) * static_cast<int64_t>(gradient.element_size());
  parallel_rows(gradient.size(0), bytes, [&](int64_t first, int64_t last) {
    for (int64_t expert = first; expert < last; ++expert) {
      const bool unused = boundaries[expert] == boundaries[expert + 1] || (trains && !trains[expert]);
      if (unused) std::memset(data_of(gradient) + expert * bytes, 0, bytes);
    }
  });
}

}  // namespace

// Per expert: dA' = gather(dO) @ down^T and, while a tile is hot, the activation's backward (first stage), which leaves
// s A and the gradient of the pre-activation in a buffer of a few experts' rows; from it both weight gradients, written
// once, and the rows of the input's gradient (second stage). Then every token sums its rows.
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
  check_trainable_experts(trainable_experts, shape.num_experts, input, "input");
  const std::optional<Tensor> trainable = as_contiguous(trainable_experts);
  const bool* trains = trainable ? trainable->const_data_ptr<bool>() : nullptr;
  const bool enk = check_weight_layout(weight_layout) == WeightLayout::kENK;
  // The layout under which the same memory multiplies gradients.
  const WeightLayout backward_layout = enk ? WeightLayout::kEKN : WeightLayout::kENK;
  const ScalarType dtype = input.scalar_type();
  const Tensor tokens = as_contiguous(input), slots = as_contiguous(permuted_to_slot);
  const Tensor gradient = as_contiguous(grad_output), kept = as_contiguous(pre_activation);
  const Tensor gate_up = with_adjacent_elements(gate_up_weight), down = with_adjacent_elements(down_weight);
  const std::optional<Tensor> weights = as_contiguous(topk_weights), bias = as_contiguous(down_bias);
  const RowMaps& maps = shape.maps;
  const int64_t num_rows = maps.num_rows, width = shape.gate_up_width;
  const int64_t inner = shape.intermediate_size, hidden = shape.hidden_size, num_experts = shape.num_experts;
  const auto size = static_cast<int64_t>(input.element_size());
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, num_rows);
  const std::vector<Group> groups = largest_first(boundaries);
  const auto num_groups = static_cast<int64_t>(groups.size());
  const GemmKernels& kernels = choose_kernels(dtype, dtype);

  Tensor grad_gate_up = new_empty_large(
      input, {wanted.gate_up_weight ? num_experts : 0, enk ? width : hidden, enk ? hidden : width}, dtype);
  Tensor grad_down =
      new_empty_large(input, {wanted.down_weight ? num_experts : 0, enk ? hidden : inner, enk ? inner : hidden}, dtype);
  Tensor grad_rows = new_empty_large(input, {wanted.input ? num_rows : 0, hidden});
  // Dropped slots have no row: their weight gradient stays zero.
  Tensor grad_weights =
      torch::stable::new_zeros(input, {wanted.topk_weights ? maps.num_tokens : 0, topk}, router_dtype(dtype));
  Tensor grad_up_bias = torch::stable::new_zeros(input, {wanted.gate_up_bias ? num_experts : 0, width});
  if (wanted.input) {
    clear_rows(grad_rows, 0, boundaries.front());
    clear_rows(grad_rows, boundaries.back(), num_rows);
  }
  clear_unused_experts(grad_gate_up, boundaries, trains);
  clear_unused_experts(grad_down, boundaries, trains);
  const bool stream = static_cast<int64_t>(grad_gate_up.numel() + grad_down.numel()) * size >= kStreamedBytes;

  // What a stage multiplies; the rows that it reads or writes need no memory yet to be cut into tiles.
  const auto product_of = [&](int32_t stage, const Group& group, const char* activated_rows,
                              const char* grad_pre_rows) {
    const Gather gather = gather_of(slots, group.begin, maps);
    const Matrix grad_tokens = row_major(gradient.const_data_ptr(), group.rows, hidden, gather);
    const Matrix input_tokens = row_major(tokens.const_data_ptr(), group.rows, hidden, gather);
    const Matrix activations = row_major(activated_rows, group.rows, inner);
    const Matrix grad_pre = row_major(grad_pre_rows, group.rows, width);
    // An expert's weight gradient is grad^T @ rows (enk) or rows^T @ grad.
    const auto weight_gradient = [&](const Matrix& in, const Matrix& grad) {
      return enk ? Product{transposed(grad), in} : Product{transposed(in), grad};
    };
    switch (stage) {
      case kActivation: return Product{grad_tokens, expert_factor(down, group.expert, backward_layout)};
      case kDownWeight: return weight_gradient(activations, grad_tokens);
      case kGateUpWeight: return weight_gradient(input_tokens, grad_pre);
      default: return Product{grad_pre, expert_factor(gate_up, group.expert, backward_layout)};
    }
  };
  const auto grid_of = [&](int32_t stage, const Group& group) {
    return TileGrid(product_of(stage, group, nullptr, nullptr), num_groups, kernels);
  };
  const ExpertPipeline pipeline(groups, groups.empty() ? 0 : grid_of(kActivation, groups.back()).count());
  const int64_t panels = (inner + kernels.panel_cols - 1) / kernels.panel_cols;
  Tensor activated = new_empty_large(input, {pipeline.num_rows(), inner});
  Tensor grad_pre = new_empty_large(input, {pipeline.num_rows(), width});
  Tensor dots = make_tensor(input, {pipeline.num_rows(), panels}, ScalarType::Double);

  const DownGradient down_gradient(dtype, shape.activation, width);
  const auto rows_of = [&](size_t index) {
    const int64_t row = pipeline.buffer_row(index), begin = groups[index].begin;
    return DownGradient::Rows{slots.const_data_ptr<int32_t>() + begin,
                              maps,
                              weights ? static_cast<const char*>(weights->const_data_ptr()) : nullptr,
                              static_cast<const char*>(kept.const_data_ptr()) + begin * width * size,
                              data_of(activated) + row * inner * size,
                              data_of(grad_pre) + row * width * size,
                              dots.mutable_data_ptr<double>() + row * panels,
                              panels};
  };

  TileQueue queue;
  pipeline.fill(
      queue,
      [&](int64_t index, TileQueue::Counter waits, TileQueue::Counter done) {
        queue.add(kActivation, static_cast<int32_t>(index), grid_of(kActivation, groups[index]), waits, done);
      },
      [&](int64_t index, TileQueue::Counter waits, TileQueue::Counter done) {
        const auto group = static_cast<int32_t>(index);
        const bool trained = !trains || trains[groups[index].expert];
        for (const auto& [stage, runs] : {std::pair{kDownWeight, wanted.down_weight && trained},
                                          {kGateUpWeight, wanted.gate_up_weight && trained},
                                          {kInputRows, wanted.input}}) {
          if (runs) queue.add(stage, group, grid_of(stage, groups[index]), waits, done);
        }
        queue.add(kRowSums, group, Tile{}, waits, done);
      });
  queue.run(2 * num_rows * hidden * (width + inner), [&](const TileQueue::Task& task) {
    const Group& group = groups[task.group];
    const Tile& tile = task.tile;
    const DownGradient::Rows rows = rows_of(task.group);
    const Product product = product_of(task.kind, group, rows.activated, rows.grad_pre_activation);
    const auto write = [&](char* output, bool past_caches) {
      multiply_tile(product, tile, kernels, Output{output, nullptr, past_caches});
    };
    switch (task.kind) {
      case kActivation: down_gradient.run(product, rows, tile); break;
      case kDownWeight: write(data_of(grad_down) + group.expert * hidden * inner * size, stream); break;
      case kGateUpWeight: write(data_of(grad_gate_up) + group.expert * hidden * width * size, stream); break;
      case kInputRows: write(data_of(grad_rows) + group.begin * hidden * size, false); break;
      case kRowSums: {
        const char* added = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
        if (wanted.topk_weights) {
          down_gradient.sum_dots(rows, group.rows, static_cast<const char*>(gradient.const_data_ptr()),
                                 added ? added + group.expert * hidden * size : nullptr, hidden, data_of(grad_weights));
        }
        if (wanted.gate_up_bias) {
          down_gradient.sum_rows(rows.grad_pre_activation, group.rows, width,
                                 data_of(grad_up_bias) + group.expert * width * size);
        }
      }
    }
  });
  Tensor grad_down_bias = wanted.down_bias ? sum_rows_by_expert(gradient, expert_offsets, slots, weights, topk, dtype)
                                           : make_tensor(input, {0, hidden});
  return {wanted.input ? unpermute(grad_rows, permuted_to_slot, slot_to_permuted, std::nullopt, topk) : grad_rows,
          grad_gate_up,
          grad_down,
          grad_weights,
          grad_up_bias,
          grad_down_bias};
}

}  // namespace moe_ext::cpu
