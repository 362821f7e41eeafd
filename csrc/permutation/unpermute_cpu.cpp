#include "unpermute.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/huge_pages.h"
#include "../common/stream_rows.h"
#include "../common/tensors.h"
#include "../common/weighted_rows.h"

namespace moe_ext::cpu {
namespace {

// The rows that a token sums, in slot order; how many there are.
template <typename scalar_t>
int64_t rows_of_token(const scalar_t* input, const int32_t* slot_to_permuted, const accumulate_t<scalar_t>* weights,
                      const RowMaps& maps, int64_t width, int64_t token, WeightedRow<scalar_t>* rows) {
  int64_t count = 0;
  for (int64_t slot = token * maps.topk; slot < (token + 1) * maps.topk; ++slot) {
    const int64_t row = slot_to_permuted[slot];
    if (row < 0 || row >= maps.num_rows) continue;
    rows[count++] = {input + row * width, weights ? weights[slot] : accumulate_t<scalar_t>(1)};
  }
  return count;
}

template <typename scalar_t>
void unpermute_rows(const scalar_t* input, const int32_t* slot_to_permuted, const accumulate_t<scalar_t>* weights,
                    scalar_t* output, const RowMaps& maps, int64_t width, int64_t begin, int64_t end) {
  std::vector<WeightedRow<scalar_t>> rows(maps.topk);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t count = rows_of_token(input, slot_to_permuted, weights, maps, width, token, rows.data());
    sum_rows(rows.data(), count, width, output + token * width);
  }
}

// Columns of one slot: weight * gradient into `scaled`, and gradient * input added to the partial sums of the dot.
// Independent partial sums: vectorisable, and the same order for any number of threads.
constexpr int64_t kLanes = 16;

template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void scale_columns(const scalar_t* gradient, const scalar_t* input, acc_t weight, int64_t columns,
                                  scalar_t* scaled, acc_t* partial) {
  acc_t products[kColumnBlock];
  for (int64_t c = 0; c < columns; ++c) {
    const acc_t value = static_cast<acc_t>(gradient[c]);
    products[c] = value * static_cast<acc_t>(input[c]);
    scaled[c] = static_cast<scalar_t>(weight * value);
  }
  acc_t sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += products[c + l];
  }
  for (int64_t l = 0; c < columns; ++c, ++l) sums[l] += products[c];
  for (int64_t l = 0; l < kLanes; ++l) partial[l] += sums[l];
}

// One slot: its row's gradient is weight * grad_output[token], its weight's gradient the dot of the two rows.
template <typename scalar_t>
accumulate_t<scalar_t> slot_backward(const scalar_t* grad_output, const scalar_t* input, scalar_t* grad_input,
                                     accumulate_t<scalar_t> weight, int64_t width, const RowWriter& writer) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t partial[kLanes] = {}, dot = 0;
  alignas(64) scalar_t staged[kColumnBlock];
  for (int64_t first = 0; first < width; first += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, width - first);
    scalar_t* scaled = writer.streamed() ? staged : grad_input + first;
    scale_columns(grad_output + first, input + first, weight, columns, scaled, partial);
    if (writer.streamed()) {
      writer.write(grad_input + first, staged, columns * static_cast<int64_t>(sizeof(scalar_t)));
    }
  }
  for (int64_t l = 0; l < kLanes; ++l) dot += partial[l];
  return dot;
}

}  // namespace

Tensor unpermute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                 const std::optional<Tensor>& topk_weights, int64_t topk) {
  const RowMaps maps = check_unpermute(input, permuted_to_slot, slot_to_permuted, topk_weights, topk);
  const Tensor rows = as_contiguous(input);
  const Tensor row_of_slot = as_contiguous(slot_to_permuted);
  const std::optional<Tensor> weights = as_contiguous(topk_weights);
  const int64_t width = input.size(1);
  Tensor output = new_empty_large(input, {maps.num_tokens, width});
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
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor rows = as_contiguous(input);
  const Tensor slot_of_row = as_contiguous(permuted_to_slot);
  const Tensor weights = as_contiguous(topk_weights);
  const int64_t width = input.size(1);
  Tensor grad_input = new_empty_large(input, {maps.num_rows, width});
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
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(scalar_t));
    const RowWriter writer(grad_row, maps.num_rows, row_bytes);
    parallel_rows(maps.num_rows, 3 * row_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t slot = slot_map[row];
        if (slot < 0 || slot >= maps.num_slots) {
          writer.zero(grad_row + row * width);
          continue;
        }
        grad_weight[slot] = slot_backward(grad + slot / maps.topk * width, source + row * width, grad_row + row * width,
                                          weight[slot], width, writer);
      }
      writer.finish();
    });
  });
  return {grad_input, grad_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("unpermute", TORCH_BOX(&moe_ext::cpu::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&moe_ext::cpu::unpermute_backward));
}
