#include "unpermute.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/cpu_parallel.h"

namespace moe_ext::cpu {
namespace {

// Columns summed at a time: a stack buffer of accumulators that stays in L1 and lets the compiler vectorise.
constexpr int64_t kColumnBlock = 256;

template <typename scalar_t>
void unpermute_rows(const scalar_t* input, const int32_t* slot_to_permuted, const accumulate_t<scalar_t>* weights,
                    scalar_t* output, const RowMaps& maps, int64_t width, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t sums[kColumnBlock];
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t first = 0; first < width; first += kColumnBlock) {
      const int64_t columns = std::min(kColumnBlock, width - first);
      std::fill_n(sums, columns, acc_t(0));
      for (int64_t j = 0; j < maps.topk; ++j) {
        const int64_t slot = token * maps.topk + j;
        const int64_t row = slot_to_permuted[slot];
        if (row < 0 || row >= maps.num_rows) continue;
        const acc_t weight = weights ? weights[slot] : acc_t(1);
        const scalar_t* source = input + row * width + first;
        for (int64_t c = 0; c < columns; ++c) sums[c] += weight * static_cast<acc_t>(source[c]);
      }
      scalar_t* destination = output + token * width + first;
      for (int64_t c = 0; c < columns; ++c) destination[c] = static_cast<scalar_t>(sums[c]);
    }
  }
}

// One slot: its row's gradient is weight * grad_output[token], its weight's gradient the dot of the two rows.
template <typename scalar_t>
accumulate_t<scalar_t> slot_backward(const scalar_t* grad_output, const scalar_t* input, scalar_t* grad_input,
                                     accumulate_t<scalar_t> weight, int64_t width) {
  using acc_t = accumulate_t<scalar_t>;
  // Independent partial sums: vectorisable, and the same order for any number of threads.
  constexpr int kLanes = 16;
  acc_t partial[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const acc_t gradient = static_cast<acc_t>(grad_output[c + lane]);
      partial[lane] += gradient * static_cast<acc_t>(input[c + lane]);
      grad_input[c + lane] = static_cast<scalar_t>(weight * gradient);
    }
  }
  acc_t dot = 0;
  for (; c < width; ++c) {
    const acc_t gradient = static_cast<acc_t>(grad_output[c]);
    dot += gradient * static_cast<acc_t>(input[c]);
    grad_input[c] = static_cast<scalar_t>(weight * gradient);
  }
  for (int lane = 0; lane < kLanes; ++lane) dot += partial[lane];
  return dot;
}

}  // namespace

Tensor unpermute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                 const std::optional<Tensor>& topk_weights, int64_t topk) {
  const RowMaps maps = check_unpermute(input, permuted_to_slot, slot_to_permuted, topk_weights, topk);
  const Tensor rows = torch::stable::contiguous(input);
  const Tensor row_of_slot = torch::stable::contiguous(slot_to_permuted);
  const std::optional<Tensor> weights =
      topk_weights.has_value() ? std::optional(torch::stable::contiguous(*topk_weights)) : std::nullopt;
  const int64_t width = input.size(1);
  Tensor output = torch::stable::new_empty(input, {maps.num_tokens, width});
  dispatch_floating(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* source = rows.const_data_ptr<scalar_t>();
    const auto* row_map = row_of_slot.const_data_ptr<int32_t>();
    const acc_t* weight = weights ? weights->const_data_ptr<acc_t>() : nullptr;
    auto* destination = output.mutable_data_ptr<scalar_t>();
    parallel_rows(maps.num_tokens, (topk + 1) * width * static_cast<int64_t>(sizeof(scalar_t)),
                  [&](int64_t begin, int64_t end) {
                    unpermute_rows(source, row_map, weight, destination, maps, width, begin, end);
                  });
  });
  return output;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_output, const Tensor& input,
                                              const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                                              const Tensor& topk_weights) {
  const RowMaps maps = check_unpermute_backward(grad_output, input, permuted_to_slot, slot_to_permuted, topk_weights);
  const Tensor gradient = torch::stable::contiguous(grad_output);
  const Tensor rows = torch::stable::contiguous(input);
  const Tensor slot_of_row = torch::stable::contiguous(permuted_to_slot);
  const Tensor weights = torch::stable::contiguous(topk_weights);
  const int64_t width = input.size(1);
  Tensor grad_input = torch::stable::new_empty(input, {maps.num_rows, width});
  // Dropped slots have no row: their weight gradient stays zero.
  Tensor grad_weights = torch::stable::new_zeros(topk_weights, {maps.num_tokens, maps.topk});
  dispatch_floating(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* grad = gradient.const_data_ptr<scalar_t>();
    const auto* source = rows.const_data_ptr<scalar_t>();
    const auto* slot_map = slot_of_row.const_data_ptr<int32_t>();
    const auto* weight = weights.const_data_ptr<acc_t>();
    auto* grad_row = grad_input.mutable_data_ptr<scalar_t>();
    auto* grad_weight = grad_weights.mutable_data_ptr<acc_t>();
    parallel_rows(maps.num_rows, 3 * width * static_cast<int64_t>(sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t slot = slot_map[row];
        if (slot < 0 || slot >= maps.num_slots) {
          std::fill_n(grad_row + row * width, width, scalar_t(0));
          continue;
        }
        grad_weight[slot] = slot_backward(grad + slot / maps.topk * width, source + row * width, grad_row + row * width,
                                          weight[slot], width);
      }
    });
  });
  return {grad_input, grad_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("unpermute", TORCH_BOX(&moe_ext::cpu::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&moe_ext::cpu::unpermute_backward));
}
