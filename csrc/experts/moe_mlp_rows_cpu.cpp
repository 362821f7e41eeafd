#include "moe_mlp_rows.h"

#include <algorithm>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../grouped_gemm/grouped_bias_grad.h"
#include "activation_rows.h"

namespace moe_ext::cpu {
namespace {

template <typename scalar_t>
accumulate_t<scalar_t> dot(const scalar_t* a, const scalar_t* b, int64_t width) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kLanes = 16;
  acc_t partial[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      partial[lane] += static_cast<acc_t>(a[c + lane]) * static_cast<acc_t>(b[c + lane]);
    }
  }
  acc_t sum = 0;
  for (; c < width; ++c) sum += static_cast<acc_t>(a[c]) * static_cast<acc_t>(b[c]);
  for (int lane = 0; lane < kLanes; ++lane) sum += partial[lane];
  return sum;
}

}  // namespace

MlpRowGradients mlp_rows_backward(const MlpRows& rows, Tensor grad_activated) {
  const RowMaps maps = rows.maps;
  const int64_t row_width = rows.pre_activation.size(1), width = grad_activated.size(1);
  const int64_t hidden_size = rows.grad_output.size(1);
  const std::vector<int64_t> boundaries = group_boundaries(rows.expert_offsets, maps.num_rows);
  Tensor grad_pre_activation = new_empty_large(rows.pre_activation, {maps.num_rows, row_width});
  // Dropped slots have no row: their weight gradient stays zero.
  Tensor grad_weights = torch::stable::new_zeros(rows.grad_output, {rows.topk_weights ? maps.num_tokens : 0, maps.topk},
                                                 router_dtype(rows.grad_output.scalar_type()));
  dispatch_floating(rows.pre_activation.scalar_type(), "pre_activation", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* source = rows.pre_activation.const_data_ptr<scalar_t>();
    auto* gradient = grad_activated.mutable_data_ptr<scalar_t>();
    const auto* grad_output = rows.grad_output.const_data_ptr<scalar_t>();
    const auto* slot_of_row = rows.permuted_to_slot.const_data_ptr<int32_t>();
    const auto* weights = rows.topk_weights ? rows.topk_weights->const_data_ptr<acc_t>() : nullptr;
    const auto* bias = rows.down_bias && weights ? rows.down_bias->const_data_ptr<scalar_t>() : nullptr;
    auto* destination = grad_pre_activation.mutable_data_ptr<scalar_t>();
    auto* grad_weight = grad_weights.mutable_data_ptr<acc_t>();
    const auto alpha = static_cast<acc_t>(rows.activation.alpha), limit = static_cast<acc_t>(rows.activation.limit);
    dispatch_activation_rows(rows.activation, [&](auto kind, auto stride) {
      const int64_t bytes = (2 * row_width + 2 * width) * static_cast<int64_t>(sizeof(scalar_t));
      parallel_rows(maps.num_rows, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t slot = slot_of_row[row];
          if (slot < 0 || slot >= maps.num_slots) {
            std::fill_n(destination + row * row_width, row_width, scalar_t(0));
            std::fill_n(gradient + row * width, width, scalar_t(0));
            continue;
          }
          acc_t inner = activate_row_backward<kind.value, stride.value, true>(
              source + row * row_width, gradient + row * width, destination + row * row_width, width,
              weights ? weights[slot] : acc_t(1), alpha, limit);
          if (bias && row >= boundaries.front() && row < boundaries.back()) {
            const int64_t expert = std::upper_bound(boundaries.begin(), boundaries.end(), row) - boundaries.begin() - 1;
            inner += dot(grad_output + slot / maps.topk * hidden_size, bias + expert * hidden_size, hidden_size);
          }
          if (weights) grad_weight[slot] = inner;
        }
      });
    });
  });
  return {grad_pre_activation, grad_activated, grad_weights};
}

Tensor down_bias_grad(const MlpRows& rows, ScalarType dtype) {
  return sum_rows_by_expert(rows.grad_output, rows.expert_offsets, rows.permuted_to_slot, rows.topk_weights,
                            rows.maps.topk, dtype);
}

}  // namespace moe_ext::cpu
