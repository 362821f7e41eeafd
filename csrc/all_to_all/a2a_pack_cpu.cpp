#include "a2a_pack.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/tensors.h"
#include "../permutation/permute.h"
#include "../permutation/unpermute.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kBytesPerEntry = 16;  // looking at an entry costs about this many bytes' worth of copying

struct Ranks {
  const int32_t* rank_expert_offsets;
  const int32_t* send_offsets;
  int num_ranks;
};

// A send row: of its token's slots those that belong to the row's rank, the rest -1 with weight 0. As find_entry.
template <typename index_t, typename weight_t>
void pack_row(int64_t row, int64_t slot, const index_t* topk_ids, const weight_t* topk_weights, const Ranks& ranks,
              const PackShape& shape, int32_t* send_ids, weight_t* send_weights) {
  const int rank = find_interval(ranks.send_offsets, ranks.num_ranks, row);
  if (rank < 0 || slot < 0 || slot >= shape.num_tokens * shape.slots) {
    std::fill_n(send_ids, shape.topk, -1);
    std::fill_n(send_weights, shape.topk, weight_t(0));
    return;
  }
  const int64_t first = ranks.rank_expert_offsets[rank], end = ranks.rank_expert_offsets[rank + 1];
  const int64_t entry = slot / shape.slots * shape.topk;
  for (int64_t j = 0; j < shape.topk; ++j) {
    const int64_t expert = topk_ids[entry + j];
    const bool here = expert >= first && expert < end;
    send_ids[j] = here ? static_cast<int32_t>(expert - first) : -1;
    send_weights[j] = here ? topk_weights[entry + j] : weight_t(0);
  }
}

// A token's weight gradients, each from the token's send row for the rank of its slot. As weight_gradient; `rank_of`
// [slots] is scratch.
template <typename index_t, typename weight_t>
void collect_weight_gradients(const index_t* topk_ids, const int32_t* rows, const weight_t* grad_send_weights,
                              const Ranks& ranks, const PackShape& shape, int* rank_of, weight_t* grad_weights) {
  for (int64_t i = 0; i < shape.slots; ++i) {
    const bool sent = rows[i] >= 0 && rows[i] < shape.num_rows;
    rank_of[i] = sent ? find_interval(ranks.send_offsets, ranks.num_ranks, rows[i]) : -1;
  }
  for (int64_t j = 0; j < shape.topk; ++j) {
    const int rank = find_interval(ranks.rank_expert_offsets, ranks.num_ranks, topk_ids[j]);
    const auto i = rank < 0 ? shape.slots : std::find(rank_of, rank_of + shape.slots, rank) - rank_of;
    grad_weights[j] = i < shape.slots ? grad_send_weights[rows[i] * shape.topk + j] : weight_t(0);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> a2a_pack(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights,
                                            const Tensor& rank_expert_offsets, const Tensor& send_offsets,
                                            const Tensor& send_to_slot, const Tensor& slot_to_send) {
  const PackShape shape =
      check_a2a_pack(hidden, topk_ids, topk_weights, rank_expert_offsets, send_offsets, send_to_slot, slot_to_send);
  Tensor send_hidden = permute(hidden, send_to_slot, slot_to_send, shape.slots);
  const Tensor ids = as_contiguous(topk_ids), weights = as_contiguous(topk_weights);
  const Tensor owners = as_contiguous(rank_expert_offsets), starts = as_contiguous(send_offsets);
  const Tensor slots = as_contiguous(send_to_slot);
  Tensor send_ids = make_tensor(topk_ids, {shape.num_rows, shape.topk}, ScalarType::Int);
  Tensor send_weights = make_tensor(topk_weights, {shape.num_rows, shape.topk});
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    dispatch_floating(topk_weights.scalar_type(), "topk_weights", [&](auto tag) {
      using weight_t = typename decltype(tag)::type;
      const auto* id = ids.const_data_ptr<typename decltype(index_tag)::type>();
      const auto* weight = weights.const_data_ptr<weight_t>();
      auto* id_out = send_ids.mutable_data_ptr<int32_t>();
      auto* weight_out = send_weights.mutable_data_ptr<weight_t>();
      const auto* slot_of_row = slots.const_data_ptr<int32_t>();
      const Ranks ranks = {owners.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(),
                           static_cast<int>(shape.num_ranks)};
      parallel_rows(shape.num_rows, shape.topk * kBytesPerEntry, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          pack_row(row, slot_of_row[row], id, weight, ranks, shape, id_out + row * shape.topk,
                   weight_out + row * shape.topk);
        }
      });
    });
  });
  return {send_hidden, send_ids, send_weights};
}

std::tuple<Tensor, Tensor> a2a_pack_backward(const Tensor& grad_send_hidden, const Tensor& grad_send_weights,
                                             const Tensor& topk_ids, const Tensor& rank_expert_offsets,
                                             const Tensor& send_offsets, const Tensor& send_to_slot,
                                             const Tensor& slot_to_send) {
  const PackShape shape = check_a2a_pack_backward(grad_send_hidden, grad_send_weights, topk_ids, rank_expert_offsets,
                                                  send_offsets, send_to_slot, slot_to_send);
  Tensor grad_hidden = unpermute(grad_send_hidden, send_to_slot, slot_to_send, std::nullopt, shape.slots);
  const Tensor ids = as_contiguous(topk_ids), grads = as_contiguous(grad_send_weights);
  const Tensor owners = as_contiguous(rank_expert_offsets), starts = as_contiguous(send_offsets);
  const Tensor rows = as_contiguous(slot_to_send);
  Tensor grad_weights = make_tensor(grad_send_weights, {shape.num_tokens, shape.topk});
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    dispatch_floating(grad_send_weights.scalar_type(), "grad_send_weights", [&](auto tag) {
      using weight_t = typename decltype(tag)::type;
      const auto* id = ids.const_data_ptr<typename decltype(index_tag)::type>();
      const auto* grad = grads.const_data_ptr<weight_t>();
      auto* grad_out = grad_weights.mutable_data_ptr<weight_t>();
      const auto* row_of_slot = rows.const_data_ptr<int32_t>();
      const Ranks ranks = {owners.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(),
                           static_cast<int>(shape.num_ranks)};
      parallel_rows(shape.num_tokens, shape.topk * kBytesPerEntry, [&](int64_t begin, int64_t end) {
        std::vector<int> rank_of(shape.slots);
        for (int64_t token = begin; token < end; ++token) {
          collect_weight_gradients(id + token * shape.topk, row_of_slot + token * shape.slots, grad, ranks, shape,
                                   rank_of.data(), grad_out + token * shape.topk);
        }
      });
    });
  });
  return {grad_hidden, grad_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("a2a_pack", TORCH_BOX(&moe_ext::cpu::a2a_pack));
  m.impl("a2a_pack_backward", TORCH_BOX(&moe_ext::cpu::a2a_pack_backward));
}
