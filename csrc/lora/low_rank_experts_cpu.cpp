// Tokens are taken kTokenBlock at a time, and of those kColumnSlab columns at a time: the slab of the weights' rows
// stays in L2 while the block's tokens pick theirs.
#include "low_rank_experts.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/weighted_rows.h"
#include "../grouped_gemm/groups.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kTokenBlock = 64;
constexpr int64_t kColumnSlab = 512;
// Sixteen (of float64 eight) independent partial sums: one vector, and an order that does not depend on threads.
constexpr int64_t kLaneBytes = 64;
template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLaneBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;
template <typename acc_t>
constexpr int64_t kLanes = kLaneBytes / static_cast<int64_t>(sizeof(acc_t));

template <typename acc_t, typename scalar_t>
MOE_HOST_DEVICE_INLINE void load_lanes(const scalar_t* source, Lanes<acc_t>& lanes) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(&lanes, source, sizeof(lanes));
  } else if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    uint16_t halves __attribute__((vector_size(kLaneBytes / 2)));
    std::memcpy(&halves, source, sizeof(halves));
    const auto words = __builtin_convertvector(halves, Lanes<uint32_t>) << 16;
    std::memcpy(&lanes, &words, sizeof(lanes));
  } else {
    acc_t values[kLanes<acc_t>];
    for (int64_t l = 0; l < kLanes<acc_t>; ++l) values[l] = static_cast<acc_t>(source[l]);
    std::memcpy(&lanes, values, sizeof(lanes));
  }
}

// dots[i] += rows[i][first : first + columns] . x for `count` rows.
template <int count, typename scalar_t, typename acc_t>
MOE_HOST_DEVICE_INLINE void add_dots(const acc_t* x, const scalar_t* const* rows, int64_t first, int64_t columns,
                                     acc_t* dots) {
  constexpr int64_t kStep = kLanes<acc_t>;
  Lanes<acc_t> sums[count] = {};
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    Lanes<acc_t> mine, row;
    load_lanes<acc_t>(x + c, mine);
    for (int i = 0; i < count; ++i) {
      load_lanes<acc_t>(rows[i] + first + c, row);
      sums[i] += mine * row;
    }
  }
  for (int i = 0; i < count; ++i) {
    acc_t dot = 0;
    for (int64_t l = 0; l < kStep; ++l) dot += sums[i][l];
    for (int64_t at = c; at < columns; ++at) dot += x[at] * static_cast<acc_t>(rows[i][first + at]);
    dots[i] += dot;
  }
}

// One token's dot products with `count` rows, over one slab of columns.
template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void add_slab(const scalar_t* x, const scalar_t* const* rows, int64_t count, int64_t first,
                             int64_t columns, acc_t* dots) {
  acc_t wide[kColumnSlab];
  for (int64_t c = 0; c < columns; ++c) wide[c] = static_cast<acc_t>(x[first + c]);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) add_dots<4>(wide, rows + i, first, columns, dots + i);
  for (; i < count; ++i) add_dots<1>(wide, rows + i, first, columns, dots + i);
}

template <typename scalar_t>
class Chosen {
 public:
  using acc_t = accumulate_t<scalar_t>;

  Chosen(const LowRankShape& shape, const Tensor& topk_ids, const Tensor& topk_weights)
      : shape_(shape),
        ids_(torch::stable::contiguous(topk_ids)),
        weights_holder_(torch::stable::contiguous(topk_weights)),
        weights_(weights_holder_.template const_data_ptr<acc_t>()) {}

  acc_t weight(int64_t slot) const { return weights_[slot]; }
  bool held(int64_t slot) const { return expert(slot) >= 0; }

  // -1 for an id outside [0, num_experts)
  int64_t expert(int64_t slot) const {
    const int64_t id = ids_.scalar_type() == ScalarType::Int ? ids_.template const_data_ptr<int32_t>()[slot]
                                                             : ids_.template const_data_ptr<int64_t>()[slot];
    return id >= 0 && id < shape_.num_experts ? id : -1;
  }

 private:
  LowRankShape shape_;
  Tensor ids_, weights_holder_;
  const acc_t* weights_;
};

// projection [T, K * r] = the dot products of x [T, H] with the chosen rows of down [E * r, H], zero where none is
// chosen; output [T, O] = the sum of the chosen rows of up [E * r, O], each times its dot product and its weight.
template <typename scalar_t>
void project_and_expand(const LowRankShape& shape, const Chosen<scalar_t>& chosen, const scalar_t* x,
                        const scalar_t* down, const scalar_t* up, accumulate_t<scalar_t>* projection,
                        scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t components = shape.components();
  const int64_t bytes_per_token =
      (components + 1) * (shape.in_features + shape.out_features) * static_cast<int64_t>(sizeof(scalar_t));
  parallel_rows(shape.num_tokens, bytes_per_token, [&](int64_t begin, int64_t end) {
    // Of a block of tokens: the chosen rows' numbers, packed token by token, and their dot products.
    std::vector<const scalar_t*> rows(kTokenBlock * components);
    std::vector<acc_t> dots(kTokenBlock * components);
    std::vector<WeightedRow<scalar_t>> weighted(kTokenBlock * components), slab(components);
    int64_t first_row[kTokenBlock + 1];
    for (int64_t block = begin; block < end; block += kTokenBlock) {
      const int64_t tokens = std::min(kTokenBlock, end - block);
      int64_t count = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        first_row[t] = count;
        for (int64_t slot = (block + t) * shape.topk; slot < (block + t + 1) * shape.topk; ++slot) {
          const int64_t expert = chosen.expert(slot);
          if (expert < 0) continue;
          for (int64_t i = 0; i < shape.rank; ++i, ++count) {
            rows[count] = down + (expert * shape.rank + i) * shape.in_features;
            weighted[count] = {up + (expert * shape.rank + i) * shape.out_features, chosen.weight(slot)};
          }
        }
      }
      first_row[tokens] = count;
      std::fill(dots.begin(), dots.begin() + count, acc_t(0));
      for (int64_t first = 0; first < shape.in_features; first += kColumnSlab) {
        const int64_t columns = std::min(kColumnSlab, shape.in_features - first);
        for (int64_t t = 0; t < tokens; ++t) {
          add_slab(x + (block + t) * shape.in_features, rows.data() + first_row[t], first_row[t + 1] - first_row[t],
                   first, columns, dots.data() + first_row[t]);
        }
      }
      for (int64_t t = 0; t < tokens; ++t) {
        acc_t* kept = projection + (block + t) * components;
        int64_t at = first_row[t];
        for (int64_t j = 0; j < shape.topk; ++j) {
          const bool held = chosen.held((block + t) * shape.topk + j);
          for (int64_t i = 0; i < shape.rank; ++i) kept[j * shape.rank + i] = held ? dots[at++] : acc_t(0);
        }
      }
      for (int64_t i = 0; i < count; ++i) weighted[i].weight *= dots[i];
      for (int64_t first = 0; first < shape.out_features; first += kColumnSlab) {
        const int64_t columns = std::min(kColumnSlab, shape.out_features - first);
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t mine = first_row[t + 1] - first_row[t];
          for (int64_t i = 0; i < mine; ++i) {
            slab[i] = {weighted[first_row[t] + i].row + first, weighted[first_row[t] + i].weight};
          }
          sum_rows(slab.data(), mine, columns, output + (block + t) * shape.out_features + first);
        }
      }
    }
  });
}

// grad_weight [E * r, width]: row e * r + i is the sum over e's slots of weight[slot] * factor[slot, i] * rows[token].
// Column slabs outermost, so that a slab of `rows` stays in L2 while the experts pick theirs.
template <typename scalar_t>
void sum_by_expert(const LowRankShape& shape, const Chosen<scalar_t>& chosen, const scalar_t* rows, int64_t width,
                   const accumulate_t<scalar_t>* factor, const std::vector<int64_t>& boundaries,
                   const int32_t* slot_of_row, scalar_t* grad_weight) {
  const int64_t slabs = (width + kColumnSlab - 1) / kColumnSlab, num_slots = shape.num_tokens * shape.topk;
  const int64_t bytes = num_slots * shape.rank * std::min(width, kColumnSlab) * static_cast<int64_t>(sizeof(scalar_t));
  parallel_rows(slabs * shape.num_experts, bytes / shape.num_experts, [&](int64_t begin, int64_t end) {
    std::vector<WeightedRow<scalar_t>> terms;
    std::vector<int64_t> slots;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t expert = item % shape.num_experts, first = item / shape.num_experts * kColumnSlab;
      slots.clear();
      for (int64_t row = boundaries[expert]; row < boundaries[expert + 1]; ++row) {
        const int64_t slot = slot_of_row[row];
        if (slot >= 0 && slot < num_slots) slots.push_back(slot);
      }
      terms.resize(slots.size());
      for (int64_t i = 0; i < shape.rank; ++i) {
        for (size_t n = 0; n < slots.size(); ++n) {
          terms[n] = {rows + slots[n] / shape.topk * width + first,
                      chosen.weight(slots[n]) * factor[slots[n] * shape.rank + i]};
        }
        sum_rows(terms.data(), static_cast<int64_t>(terms.size()), std::min(kColumnSlab, width - first),
                 grad_weight + (expert * shape.rank + i) * width + first);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_experts(const Tensor& input, const Tensor& lora_a, const Tensor& lora_b,
                                            const Tensor& topk_ids, const Tensor& topk_weights) {
  const LowRankShape shape = check_low_rank_experts(input, lora_a, lora_b, topk_ids, topk_weights);
  const Tensor rows = torch::stable::contiguous(input);
  const Tensor down = torch::stable::contiguous(lora_a), up = torch::stable::contiguous(lora_b);
  Tensor output = torch::stable::new_empty(input, {shape.num_tokens, shape.out_features});
  Tensor projection = torch::stable::new_empty(topk_weights, {shape.num_tokens, shape.components()});
  dispatch_floating(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    project_and_expand(shape, Chosen<scalar_t>(shape, topk_ids, topk_weights), rows.const_data_ptr<scalar_t>(),
                       down.const_data_ptr<scalar_t>(), up.const_data_ptr<scalar_t>(),
                       projection.mutable_data_ptr<accumulate_t<scalar_t>>(), output.mutable_data_ptr<scalar_t>());
  });
  return {output, projection};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_experts_backward(const Tensor& grad_output, const Tensor& input,
                                                                     const Tensor& lora_a, const Tensor& lora_b,
                                                                     const Tensor& topk_ids, const Tensor& topk_weights,
                                                                     const Tensor& projection,
                                                                     const Tensor& expert_offsets,
                                                                     const Tensor& permuted_to_slot) {
  const LowRankShape shape = check_low_rank_experts_backward(grad_output, input, lora_a, lora_b, topk_ids, topk_weights,
                                                             projection, expert_offsets, permuted_to_slot);
  const Tensor gradient = torch::stable::contiguous(grad_output), rows = torch::stable::contiguous(input);
  const Tensor down = torch::stable::contiguous(lora_a), up = torch::stable::contiguous(lora_b);
  const Tensor projected = torch::stable::contiguous(projection);
  const Tensor slots = torch::stable::contiguous(permuted_to_slot);
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, slots.numel());
  Tensor grad_input = torch::stable::new_empty(input, {shape.num_tokens, shape.in_features});
  Tensor grad_down = torch::stable::new_empty(input, {shape.num_experts, shape.rank, shape.in_features});
  Tensor grad_up = torch::stable::new_empty(input, {shape.num_experts, shape.rank, shape.out_features});
  Tensor grad_weights = torch::stable::new_empty(topk_weights, {shape.num_tokens, shape.topk});
  const Tensor back = torch::stable::new_empty(topk_weights, {shape.num_tokens, shape.components()});
  dispatch_floating(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const Chosen<scalar_t> chosen(shape, topk_ids, topk_weights);
    const auto* x = rows.const_data_ptr<scalar_t>();
    const auto* grad = gradient.const_data_ptr<scalar_t>();
    const auto* forth_dots = projected.const_data_ptr<acc_t>();
    const auto* slot_of_row = slots.const_data_ptr<int32_t>();
    auto* back_dots = back.mutable_data_ptr<acc_t>();
    auto* grad_weight = grad_weights.mutable_data_ptr<acc_t>();
    project_and_expand(shape.transposed(), chosen, grad, up.const_data_ptr<scalar_t>(), down.const_data_ptr<scalar_t>(),
                       back_dots, grad_input.mutable_data_ptr<scalar_t>());
    for (int64_t slot = 0; slot < shape.num_tokens * shape.topk; ++slot) {
      acc_t sum = 0;
      for (int64_t q = slot * shape.rank; q < (slot + 1) * shape.rank; ++q) sum += forth_dots[q] * back_dots[q];
      grad_weight[slot] = sum;
    }
    sum_by_expert(shape, chosen, x, shape.in_features, back_dots, boundaries, slot_of_row,
                  grad_down.mutable_data_ptr<scalar_t>());
    sum_by_expert(shape, chosen, grad, shape.out_features, forth_dots, boundaries, slot_of_row,
                  grad_up.mutable_data_ptr<scalar_t>());
  });
  return {grad_input, grad_down, grad_up, grad_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("low_rank_experts", TORCH_BOX(&moe_ext::cpu::low_rank_experts));
  m.impl("low_rank_experts_backward", TORCH_BOX(&moe_ext::cpu::low_rank_experts_backward));
}
