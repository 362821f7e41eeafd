// Tokens are taken kTokenBlock at a time, and of those kSlab columns at a time: the slab of the weights' rows stays in
// L1 or L2 while the block's tokens pick theirs. Where tokens use a row often enough the slabs are copied, in the type
// of the sums or, for dot products of bfloat16 where the machine multiplies them, as they are. Only the picked rows are
// multiplied, one load for each multiply-add, which is what a core can do of both: a masked product of all E r rows
// multiplies E / K times as much, and sorted rows have to be written and added up.
#include "low_rank_experts.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/host_device.h"
#include "../common/tensors.h"
#include "../grouped_gemm/cpu/multiply_tile.h"
#include "../grouped_gemm/groups.h"
#include "projection_cpu.h"

namespace moe_ext::cpu {
namespace {

// From so many uses of a row of the weights on it pays to copy them.
constexpr int64_t kUsesPerCopy = 32;

// sums[c ...] = the picked rows times their factors, `vectors` vectors from column c on.
template <int vectors, typename weight_t, typename acc_t>
MOE_HOST_DEVICE_INLINE void expand_columns(const WeightRows<weight_t>& weights, const weight_t* slab,
                                           const int64_t* picked, const acc_t* factors, int64_t count, int64_t c,
                                           acc_t* sums) {
  constexpr int64_t kStep = kLanes<acc_t>;
  Lanes<acc_t> total[vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const weight_t* row = slab + picked[i] * weights.row_stride + c;
    const acc_t factor = factors[i];
    for (int v = 0; v < vectors; ++v) {
      Lanes<acc_t> values;
      load_lanes<acc_t>(row + v * kStep, values);
      total[v] += factor * values;
    }
  }
  for (int v = 0; v < vectors; ++v) std::memcpy(sums + c + v * kStep, &total[v], kLaneBytes);
}

// One slab of columns of output [tokens, width].
template <typename scalar_t, typename weight_t>
MOE_CPU_CLONES void expand_slab(const WeightRows<weight_t>& weights, int64_t first, int64_t columns,
                                const Picks<accumulate_t<scalar_t>>& picks, scalar_t* output, int64_t width) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kStep = kLanes<acc_t>;
  const weight_t* slab = weights.slab(first);
  acc_t sums[kSlab];
  for (int64_t t = 0; t < picks.tokens; ++t) {
    const int64_t begin = picks.first[t], count = picks.first[t + 1] - begin;
    const int64_t* rows = picks.rows.data() + begin;
    const acc_t* factors = picks.factors.data() + begin;
    int64_t c = 0;
    for (; c + 8 * kStep <= columns; c += 8 * kStep) expand_columns<8>(weights, slab, rows, factors, count, c, sums);
    for (; c + kStep <= columns; c += kStep) expand_columns<1>(weights, slab, rows, factors, count, c, sums);
    for (; c < columns; ++c) {
      sums[c] = 0;
      for (int64_t i = 0; i < count; ++i) {
        sums[c] += factors[i] * static_cast<acc_t>(slab[rows[i] * weights.row_stride + c]);
      }
    }
    for (c = 0; c < columns; ++c) output[t * width + first + c] = static_cast<scalar_t>(sums[c]);
  }
}

// sums[i][c ...] += factors[n * rank + i] * rows[n][c ...] over n, for `ranks` i and `vectors` vectors.
template <int ranks, int vectors, typename acc_t>
MOE_HOST_DEVICE_INLINE void add_outer(const acc_t* rows, const acc_t* factors, int64_t count, int64_t rank,
                                      acc_t* sums) {
  constexpr int64_t kStep = kLanes<acc_t>;
  Lanes<acc_t> total[ranks][vectors];
  for (int i = 0; i < ranks; ++i) {
    for (int v = 0; v < vectors; ++v) load_lanes<acc_t>(sums + i * kSlab + v * kStep, total[i][v]);
  }
  for (int64_t n = 0; n < count; ++n) {
    Lanes<acc_t> row[vectors];
    for (int v = 0; v < vectors; ++v) load_lanes<acc_t>(rows + n * kSlab + v * kStep, row[v]);
    for (int i = 0; i < ranks; ++i) {
      const acc_t factor = factors[n * rank + i];
      for (int v = 0; v < vectors; ++v) total[i][v] += factor * row[v];
    }
  }
  for (int i = 0; i < ranks; ++i) {
    for (int v = 0; v < vectors; ++v) std::memcpy(sums + i * kSlab + v * kStep, &total[i][v], kLaneBytes);
  }
}

// sums [rank, kSlab] += factors^T [rank, count] @ rows [count, kSlab]
template <typename acc_t>
MOE_CPU_CLONES void add_outer_products(const acc_t* rows, const acc_t* factors, int64_t count, int64_t rank,
                                       acc_t* sums) {
  constexpr int64_t kStep = kLanes<acc_t>;
  int64_t i = 0;
  for (; i + 4 <= rank; i += 4) {
    for (int64_t c = 0; c < kSlab; c += 2 * kStep) {
      add_outer<4, 2>(rows + c, factors + i, count, rank, sums + i * kSlab + c);
    }
  }
  for (; i < rank; ++i) {
    for (int64_t c = 0; c < kSlab; c += 4 * kStep) {
      add_outer<1, 4>(rows + c, factors + i, count, rank, sums + i * kSlab + c);
    }
  }
}

template <typename from_t, typename to_t>
MOE_CPU_CLONES void convert(const from_t* from, int64_t count, to_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<to_t>(from[i]);
}

template <typename scalar_t>
class Chosen {
 public:
  using acc_t = accumulate_t<scalar_t>;

  Chosen(const LowRankShape& shape, const Tensor& topk_ids, const Tensor& topk_weights)
      : experts_(shape.num_tokens * shape.topk),
        weights_holder_(as_contiguous(topk_weights)),
        weights_(weights_holder_.template const_data_ptr<acc_t>()) {
    const Tensor ids = as_contiguous(topk_ids);
    dispatch_index(ids.scalar_type(), "topk_ids", [&](auto tag) {
      using index_t = typename decltype(tag)::type;
      const auto* id = ids.const_data_ptr<index_t>();
      for (size_t slot = 0; slot < experts_.size(); ++slot) {
        experts_[slot] = id[slot] >= 0 && id[slot] < shape.num_experts ? static_cast<int32_t>(id[slot]) : -1;
      }
    });
  }

  acc_t weight(int64_t slot) const { return weights_[slot]; }
  bool held(int64_t slot) const { return expert(slot) >= 0; }
  int64_t expert(int64_t slot) const { return experts_[slot]; }  // -1 for an id outside [0, num_experts)

 private:
  std::vector<int32_t> experts_;
  Tensor weights_holder_;
  const acc_t* weights_;
};

// weight [num_rows, width] in `type`, slab after slab of `columns` columns; zero beyond the width.
template <typename scalar_t, typename copy_t>
Tensor copy_slabs(const Tensor& weight, int64_t num_rows, int64_t width, int64_t slab_columns, ScalarType type) {
  const int64_t slabs = (width + slab_columns - 1) / slab_columns;
  Tensor copy = make_tensor(weight, {slabs, num_rows, slab_columns}, type);
  const auto* from = weight.const_data_ptr<scalar_t>();
  auto* to = copy.mutable_data_ptr<copy_t>();
  parallel_rows(slabs, num_rows * slab_columns * static_cast<int64_t>(sizeof(copy_t)), [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t first = slab * slab_columns, columns = std::min(slab_columns, width - first);
      for (int64_t row = 0; row < num_rows; ++row) {
        copy_t* copied = to + (slab * num_rows + row) * slab_columns;
        convert(from + row * width + first, columns, copied);
        std::fill(copied + columns, copied + slab_columns, copy_t(0));
      }
    }
  });
  return copy;
}

// projection [T, K * r] = the dot products of x [T, H] with the chosen rows of down [E * r, H], zero where none is
// chosen; output [T, O], unless null, = the sum of the chosen rows of up [E * r, O], each times its dot product and its
// weight. project(x of a block of tokens, picks) adds to the block's dot products.
template <typename scalar_t, typename weight_t, typename Project>
void project_and_expand(const LowRankShape& shape, const Chosen<scalar_t>& chosen, const scalar_t* x,
                        const Project& project, const WeightRows<weight_t>& up, accumulate_t<scalar_t>* projection,
                        scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t components = shape.components();
  const int64_t bytes_per_token =
      (components + 1) * (shape.in_features + shape.out_features) * static_cast<int64_t>(sizeof(scalar_t));
  parallel_rows(shape.num_tokens, bytes_per_token, [&](int64_t begin, int64_t end) {
    Picks<acc_t> picks;
    picks.rows.resize(kTokenBlock * components);
    picks.dots.resize(kTokenBlock * components);
    picks.factors.resize(kTokenBlock * components);
    for (int64_t block = begin; block < end; block += kTokenBlock) {
      picks.tokens = std::min(kTokenBlock, end - block);
      int64_t count = 0;
      for (int64_t t = 0; t < picks.tokens; ++t) {
        picks.first[t] = count;
        for (int64_t slot = (block + t) * shape.topk; slot < (block + t + 1) * shape.topk; ++slot) {
          const int64_t expert = chosen.expert(slot);
          if (expert < 0) continue;
          for (int64_t i = 0; i < shape.rank; ++i, ++count) {
            picks.rows[count] = expert * shape.rank + i;
            picks.factors[count] = chosen.weight(slot);
          }
        }
      }
      picks.first[picks.tokens] = count;
      std::fill(picks.dots.begin(), picks.dots.begin() + count, acc_t(0));
      project(x + block * shape.in_features, picks);
      acc_t* kept = projection + block * components;
      for (int64_t slot = 0, at = 0; slot < picks.tokens * shape.topk; ++slot) {
        const bool held = chosen.held(block * shape.topk + slot);
        for (int64_t i = 0; i < shape.rank; ++i) kept[slot * shape.rank + i] = held ? picks.dots[at++] : acc_t(0);
      }
      if (!output) continue;
      for (int64_t i = 0; i < count; ++i) picks.factors[i] *= picks.dots[i];
      for (int64_t first = 0; first < shape.out_features; first += kSlab) {
        const int64_t columns = std::min(kSlab, shape.out_features - first);
        expand_slab(up, first, columns, picks, output + block * shape.out_features, shape.out_features);
      }
    }
  });
}

template <typename scalar_t>
void project_and_expand(const LowRankShape& shape, const Chosen<scalar_t>& chosen, const scalar_t* x,
                        const Tensor& down, const Tensor& up, accumulate_t<scalar_t>* projection, scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t num_rows = shape.num_experts * shape.rank, width = shape.in_features;
  if (shape.num_tokens * shape.topk < kUsesPerCopy * shape.num_experts) {
    const WeightRows<scalar_t> from = {down.const_data_ptr<scalar_t>(), width, 1};
    const WeightRows<scalar_t> to = {up.const_data_ptr<scalar_t>(), shape.out_features, 1};
    const auto in_place = [&](const scalar_t* block, Picks<acc_t>& picks) { project(block, width, from, picks); };
    return project_and_expand(shape, chosen, x, in_place, to, projection, output);
  }
  const ScalarType wide = router_dtype(down.scalar_type());
  const Tensor expanded = copy_slabs<scalar_t, acc_t>(up, output ? num_rows : 0, shape.out_features, kSlab, wide);
  const WeightRows<acc_t> to = {expanded.const_data_ptr<acc_t>(), kSlab, num_rows};
#ifdef MOE_EXT_PAIRS
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    if (choose_kernels(down.scalar_type(), down.scalar_type()).elements_per_unit == 2) {
      const Tensor copy = copy_slabs<scalar_t, scalar_t>(down, num_rows, width, kPairSlab, down.scalar_type());
      const WeightRows<scalar_t> from = {copy.const_data_ptr<scalar_t>(), kPairSlab, num_rows};
      const auto in_pairs = [&](const scalar_t* block, Picks<acc_t>& picks) {
        project_pairs(block, width, from, picks);
      };
      return project_and_expand(shape, chosen, x, in_pairs, to, projection, output);
    }
  }
#endif
  const Tensor copy = copy_slabs<scalar_t, acc_t>(down, num_rows, width, kSlab, wide);
  const WeightRows<acc_t> from = {copy.const_data_ptr<acc_t>(), kSlab, num_rows};
  const auto in_slabs = [&](const scalar_t* block, Picks<acc_t>& picks) { project(block, width, from, picks); };
  project_and_expand(shape, chosen, x, in_slabs, to, projection, output);
}

// grad_weight [E * r, width]: row e * r + i is the sum over e's slots of weight[slot] * factor[slot, i] * rows[token],
// in the order of the slots. Column slabs outermost, so that a slab of `rows` stays in L2 while the experts pick
// theirs.
template <typename scalar_t>
void sum_by_expert(const LowRankShape& shape, const Chosen<scalar_t>& chosen, const scalar_t* rows, int64_t width,
                   const accumulate_t<scalar_t>* factor, const std::vector<int64_t>& boundaries,
                   const int32_t* slot_of_row, scalar_t* grad_weight) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kSlotBlock = 64;
  const int64_t slabs = (width + kSlab - 1) / kSlab, num_slots = shape.num_tokens * shape.topk, rank = shape.rank;
  const int64_t bytes = num_slots * rank * std::min(width, kSlab) * static_cast<int64_t>(sizeof(scalar_t));
  parallel_rows(slabs * shape.num_experts, bytes / shape.num_experts, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> picked(kSlotBlock * kSlab), factors(kSlotBlock * rank), sums(rank * kSlab);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t expert = item % shape.num_experts, first = item / shape.num_experts * kSlab;
      const int64_t columns = std::min(kSlab, width - first);
      std::fill(sums.begin(), sums.end(), acc_t(0));
      int64_t count = 0;
      const auto add = [&] {
        add_outer_products(picked.data(), factors.data(), count, rank, sums.data());
        count = 0;
      };
      for (int64_t row = boundaries[expert]; row < boundaries[expert + 1]; ++row) {
        const int64_t slot = slot_of_row[row];
        if (slot < 0 || slot >= num_slots) continue;
        convert(rows + slot / shape.topk * width + first, columns, picked.data() + count * kSlab);
        for (int64_t i = 0; i < rank; ++i) {
          factors[count * rank + i] = chosen.weight(slot) * factor[slot * rank + i];
        }
        if (++count == kSlotBlock) add();
      }
      add();
      for (int64_t i = 0; i < rank; ++i) {
        convert(sums.data() + i * kSlab, columns, grad_weight + (expert * rank + i) * width + first);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_experts(const Tensor& input, const Tensor& lora_a, const Tensor& lora_b,
                                            const Tensor& topk_ids, const Tensor& topk_weights) {
  const LowRankShape shape = check_low_rank_experts(input, lora_a, lora_b, topk_ids, topk_weights);
  const Tensor rows = as_contiguous(input);
  const Tensor down = as_contiguous(lora_a), up = as_contiguous(lora_b);
  Tensor output = make_tensor(input, {shape.num_tokens, shape.out_features});
  Tensor projection = make_tensor(topk_weights, {shape.num_tokens, shape.components()});
  dispatch_floating(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    project_and_expand(shape, Chosen<scalar_t>(shape, topk_ids, topk_weights), rows.const_data_ptr<scalar_t>(), down,
                       up, projection.mutable_data_ptr<accumulate_t<scalar_t>>(), output.mutable_data_ptr<scalar_t>());
  });
  return {output, projection};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_experts_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& lora_a, const Tensor& lora_b, const Tensor& topk_ids,
    const Tensor& topk_weights, const Tensor& projection, const Tensor& expert_offsets, const Tensor& permuted_to_slot,
    std::vector<bool> output_mask) {
  const LowRankShape shape = check_low_rank_experts_backward(grad_output, input, lora_a, lora_b, topk_ids, topk_weights,
                                                             projection, expert_offsets, permuted_to_slot);
  const LowRankGradientMask wanted = check_low_rank_output_mask(output_mask);
  const Tensor gradient = as_contiguous(grad_output), rows = as_contiguous(input);
  const Tensor down = as_contiguous(lora_a), up = as_contiguous(lora_b);
  const Tensor projected = as_contiguous(projection);
  const Tensor slots = as_contiguous(permuted_to_slot);
  const std::vector<int64_t> boundaries = group_boundaries(expert_offsets, slots.numel());
  LowRankGradients grads = new_low_rank_gradients(shape, wanted, input, topk_weights);
  dispatch_floating(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const Chosen<scalar_t> chosen(shape, topk_ids, topk_weights);
    const auto* x = rows.const_data_ptr<scalar_t>();
    const auto* grad = gradient.const_data_ptr<scalar_t>();
    const auto* forth_dots = projected.const_data_ptr<acc_t>();
    const auto* slot_of_row = slots.const_data_ptr<int32_t>();
    auto* back_dots = grads.back.mutable_data_ptr<acc_t>();
    if (wanted.back()) {
      project_and_expand(shape.transposed(), chosen, grad, up, down, back_dots,
                         wanted.input ? grads.input.mutable_data_ptr<scalar_t>() : nullptr);
    }
    if (wanted.topk_weights) {
      auto* grad_weight = grads.topk_weights.mutable_data_ptr<acc_t>();
      for (int64_t slot = 0; slot < shape.num_tokens * shape.topk; ++slot) {
        acc_t sum = 0;
        for (int64_t q = slot * shape.rank; q < (slot + 1) * shape.rank; ++q) sum += forth_dots[q] * back_dots[q];
        grad_weight[slot] = sum;
      }
    }
    if (wanted.lora_a) {
      sum_by_expert(shape, chosen, x, shape.in_features, back_dots, boundaries, slot_of_row,
                    grads.lora_a.mutable_data_ptr<scalar_t>());
    }
    if (wanted.lora_b) {
      sum_by_expert(shape, chosen, grad, shape.out_features, forth_dots, boundaries, slot_of_row,
                    grads.lora_b.mutable_data_ptr<scalar_t>());
    }
  });
  return {grads.input, grads.lora_a, grads.lora_b, grads.topk_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("low_rank_experts", TORCH_BOX(&moe_ext::cpu::low_rank_experts));
  m.impl("low_rank_experts_backward", TORCH_BOX(&moe_ext::cpu::low_rank_experts_backward));
}
