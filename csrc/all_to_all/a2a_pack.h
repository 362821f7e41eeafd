// a2a_pack: the rows that go out, one per (token, rank), with the experts and weights that the rank needs beside them.
// Rows move by permute and unpermute; this family adds the metadata.
#pragma once

#include <tuple>

#include "../common/dtypes.h"
#include "../common/row_maps.h"
#include "ranks.h"

namespace moe_ext {

struct PackShape {
  int64_t num_tokens, topk, num_ranks, slots, num_rows;
};

inline PackShape check_pack_maps(const Tensor& topk_ids, const Tensor& rank_expert_offsets, const Tensor& send_offsets,
                                 const Tensor& send_to_slot, const Tensor& slot_to_send) {
  check_topk_ids(topk_ids);
  const int64_t num_ranks = check_rank_expert_offsets(rank_expert_offsets, topk_ids);
  const int64_t slots = slots_per_token(topk_ids.size(1), num_ranks);
  const RowMaps maps = check_row_maps(send_to_slot, slot_to_send, slots);
  MOE_CHECK(maps.num_tokens == topk_ids.size(0),
            "slot_to_send: expected num_tokens * min(topk, num_ranks) = ", topk_ids.size(0) * slots, " entries, got ",
            maps.num_slots);
  check_tensor(send_offsets, "send_offsets", {ScalarType::Int}, 1, "[num_ranks + 1]");
  check_size(send_offsets, "send_offsets", 0, num_ranks + 1, "num_ranks + 1, as in rank_expert_offsets");
  check_same_device(send_offsets, "send_offsets", topk_ids, "topk_ids");
  check_same_device(send_to_slot, "send_to_slot", topk_ids, "topk_ids");
  return {topk_ids.size(0), topk_ids.size(1), num_ranks, slots, maps.num_rows};
}

inline PackShape check_a2a_pack(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights,
                                const Tensor& rank_expert_offsets, const Tensor& send_offsets,
                                const Tensor& send_to_slot, const Tensor& slot_to_send) {
  const PackShape shape = check_pack_maps(topk_ids, rank_expert_offsets, send_offsets, send_to_slot, slot_to_send);
  check_tensor(hidden, "hidden", {MOE_FLOATING}, 2, "[num_tokens, hidden_size]");
  check_size(hidden, "hidden", 0, shape.num_tokens, "num_tokens, as in topk_ids");
  check_same_device(hidden, "hidden", topk_ids, "topk_ids");
  check_tensor(topk_weights, "topk_weights", {router_dtype(hidden.scalar_type())}, 2, "[num_tokens, topk]");
  check_size(topk_weights, "topk_weights", 0, shape.num_tokens, "num_tokens, as in topk_ids");
  check_size(topk_weights, "topk_weights", 1, shape.topk, "topk, as in topk_ids");
  check_same_device(topk_weights, "topk_weights", topk_ids, "topk_ids");
  return shape;
}

inline PackShape check_a2a_pack_backward(const Tensor& grad_send_hidden, const Tensor& grad_send_weights,
                                         const Tensor& topk_ids, const Tensor& rank_expert_offsets,
                                         const Tensor& send_offsets, const Tensor& send_to_slot,
                                         const Tensor& slot_to_send) {
  const PackShape shape = check_pack_maps(topk_ids, rank_expert_offsets, send_offsets, send_to_slot, slot_to_send);
  check_tensor(grad_send_hidden, "grad_send_hidden", {MOE_FLOATING}, 2, "[num_rows, hidden_size]");
  check_size(grad_send_hidden, "grad_send_hidden", 0, shape.num_rows, "num_rows, the length of send_to_slot");
  check_tensor(grad_send_weights, "grad_send_weights", {router_dtype(grad_send_hidden.scalar_type())}, 2,
               "[num_rows, topk]");
  check_size(grad_send_weights, "grad_send_weights", 0, shape.num_rows, "num_rows, the length of send_to_slot");
  check_size(grad_send_weights, "grad_send_weights", 1, shape.topk, "topk, as in topk_ids");
  check_same_device(grad_send_hidden, "grad_send_hidden", topk_ids, "topk_ids");
  check_same_device(grad_send_weights, "grad_send_weights", topk_ids, "topk_ids");
  return shape;
}

// The token in send row `row`'s slot, -1 where the slot holds none.
MOE_HOST_DEVICE inline int64_t token_of_row(int64_t slot, const PackShape& shape) {
  return slot >= 0 && slot < shape.num_tokens * shape.slots ? slot / shape.slots : -1;
}

template <typename weight_t>
struct PackEntry {
  int32_t local_id;
  weight_t weight;
};

// The local expert id and weight of a token's slot j if it belongs to `rank`. A token or rank of -1 has none, and
// weights may be absent.
template <typename index_t, typename weight_t>
MOE_HOST_DEVICE inline PackEntry<weight_t> find_entry(int64_t token, int rank, int64_t j, const index_t* topk_ids,
                                                      const weight_t* topk_weights, const int32_t* rank_expert_offsets,
                                                      const PackShape& shape) {
  if (token < 0 || rank < 0) return {-1, 0};
  const int64_t entry = token * shape.topk + j, expert = topk_ids[entry];
  const int64_t first = rank_expert_offsets[rank], end = rank_expert_offsets[rank + 1];
  if (expert < first || expert >= end) return {-1, 0};
  return {static_cast<int32_t>(expert - first), topk_weights ? topk_weights[entry] : weight_t(0)};
}

// Where the gradient of weight (token, j) is found: the token's send row for the rank of its slot j.
template <typename index_t, typename weight_t>
MOE_HOST_DEVICE inline weight_t weight_gradient(int64_t token, int64_t j, const index_t* topk_ids,
                                                const int32_t* rank_expert_offsets, const int32_t* send_offsets,
                                                const int32_t* slot_to_send, const PackShape& shape,
                                                const weight_t* grad_send_weights) {
  const int num_ranks = static_cast<int>(shape.num_ranks);
  const int rank = find_interval(rank_expert_offsets, num_ranks, topk_ids[token * shape.topk + j]);
  if (rank < 0) return 0;
  for (int64_t i = 0; i < shape.slots; ++i) {
    const int64_t row = slot_to_send[token * shape.slots + i];
    if (row >= 0 && row < shape.num_rows && find_interval(send_offsets, num_ranks, row) == rank) {
      return grad_send_weights[row * shape.topk + j];
    }
  }
  return 0;
}

#define MOE_DECLARE_A2A_PACK                                                                                       \
  std::tuple<Tensor, Tensor, Tensor> a2a_pack(                                                                     \
      const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& rank_expert_offsets, \
      const Tensor& send_offsets, const Tensor& send_to_slot, const Tensor& slot_to_send);                         \
  std::tuple<Tensor, Tensor> a2a_pack_backward(const Tensor& grad_send_hidden, const Tensor& grad_send_weights,    \
                                               const Tensor& topk_ids, const Tensor& rank_expert_offsets,          \
                                               const Tensor& send_offsets, const Tensor& send_to_slot,             \
                                               const Tensor& slot_to_send);
namespace cpu {
MOE_DECLARE_A2A_PACK
}
namespace cuda {
MOE_DECLARE_A2A_PACK
}
#undef MOE_DECLARE_A2A_PACK

}  // namespace moe_ext
