// a2a_combine: rows that came back, in send order [S, H] -> the sum over each token's rows [T, H], in fp32, rounded
// once.
#pragma once

#include "../common/dtypes.h"
#include "../common/row_maps.h"

namespace moe_ext {

inline void check_a2a_combine(const Tensor& recv_rows, const Tensor& send_to_slot, const Tensor& slot_to_send,
                              int64_t slots_per_token) {
  check_at_least(slots_per_token, "slots_per_token", 1);
  check_tensor(recv_rows, "recv_rows", {MOE_FLOATING}, 2, "[num_rows, hidden_size]");
  check_tensor(send_to_slot, "send_to_slot", {ScalarType::Int}, 1, "[num_rows]");
  check_size(recv_rows, "recv_rows", 0, send_to_slot.size(0), "num_rows, the length of send_to_slot");
}

#define MOE_DECLARE_A2A_COMBINE                                                                       \
  Tensor a2a_combine(const Tensor& recv_rows, const Tensor& send_to_slot, const Tensor& slot_to_send, \
                     int64_t slots_per_token);
namespace cpu {
MOE_DECLARE_A2A_COMBINE
}
namespace cuda {
MOE_DECLARE_A2A_COMBINE
}
#undef MOE_DECLARE_A2A_COMBINE

}  // namespace moe_ext
