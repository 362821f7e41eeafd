// a2a_pack_rows: a2a_pack with everything of a row in one row of bytes (packed_row.h), quantised on the way if asked.
#pragma once

#include <optional>
#include <string>

#include "a2a_pack.h"
#include "packed_row.h"

namespace moe_ext {

struct PackRows {
  PackShape shape;
  PackedRow row;
  int64_t copies;  // send tokens that share a row of hidden: 1, or topk where every slot travels alone
};

inline PackRows check_a2a_pack_rows(const Tensor& hidden, const Tensor& topk_ids,
                                    const std::optional<Tensor>& topk_weights, const Tensor& rank_expert_offsets,
                                    const Tensor& send_offsets, const Tensor& send_to_slot, const Tensor& slot_to_send,
                                    const std::string& payload, int64_t copies) {
  const PackShape shape = check_pack_maps(topk_ids, rank_expert_offsets, send_offsets, send_to_slot, slot_to_send);
  check_at_least(copies, "copies", 1);
  check_tensor(hidden, "hidden", {MOE_FLOATING}, 2, "[num_tokens, hidden_size]");
  MOE_CHECK(hidden.size(0) * copies == shape.num_tokens,
            "hidden: expected [num_tokens, hidden_size] with num_tokens * ", copies, " (copies) = ", shape.num_tokens,
            ", the rows of topk_ids, got ", describe(hidden));
  check_at_least(hidden.size(1), "hidden_size, the columns of hidden", 1);
  check_same_device(hidden, "hidden", topk_ids, "topk_ids");
  const ScalarType weight_dtype = router_dtype(hidden.scalar_type());
  if (topk_weights) {
    check_tensor(*topk_weights, "topk_weights", {weight_dtype}, 2, "[num_tokens, topk]");
    check_size(*topk_weights, "topk_weights", 0, shape.num_tokens, "num_tokens, as in topk_ids");
    check_size(*topk_weights, "topk_weights", 1, shape.topk, "topk, as in topk_ids");
    check_same_device(*topk_weights, "topk_weights", topk_ids, "topk_ids");
  }
  const int64_t weight_bytes = topk_weights ? (weight_dtype == ScalarType::Double ? 8 : 4) : 0;
  const PackedRow row(hidden.size(1), shape.topk, static_cast<int64_t>(hidden.element_size()), weight_bytes,
                      is_quantised(payload));
  return {shape, row, copies};
}

#define MOE_DECLARE_A2A_PACK_ROWS                                                                                 \
  Tensor a2a_pack_rows(const Tensor& hidden, const Tensor& topk_ids, const std::optional<Tensor>& topk_weights,   \
                       const Tensor& rank_expert_offsets, const Tensor& send_offsets, const Tensor& send_to_slot, \
                       const Tensor& slot_to_send, std::string payload, int64_t copies);
namespace cpu {
MOE_DECLARE_A2A_PACK_ROWS
}
namespace cuda {
MOE_DECLARE_A2A_PACK_ROWS
}
#undef MOE_DECLARE_A2A_PACK_ROWS

}  // namespace moe_ext
