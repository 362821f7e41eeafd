// a2a_unpack: received rows [S', H] -> rows in expert order, with the routing plan of the receiving rank.
#pragma once

#include <tuple>

#include "../common/dtypes.h"

namespace moe_ext {

inline void check_a2a_unpack(const Tensor& recv_hidden, const Tensor& recv_ids) {
  check_tensor(recv_hidden, "recv_hidden", {MOE_FLOATING}, 2, "[num_received, hidden_size]");
  check_tensor(recv_ids, "recv_ids", {ScalarType::Int, ScalarType::Long}, 2, "[num_received, topk]");
  check_at_least(recv_ids.size(1), "topk, the columns of recv_ids", 1);
  check_size(recv_ids, "recv_ids", 0, recv_hidden.size(0), "num_received, as in recv_hidden");
  check_same_device(recv_ids, "recv_ids", recv_hidden, "recv_hidden");
}

#define MOE_DECLARE_A2A_UNPACK                                                                                     \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> a2a_unpack(const Tensor& recv_hidden, const Tensor& recv_ids, \
                                                                int64_t num_local_experts, int64_t row_alignment);
namespace cpu {
MOE_DECLARE_A2A_UNPACK
}
namespace cuda {
MOE_DECLARE_A2A_UNPACK
}
#undef MOE_DECLARE_A2A_UNPACK

}  // namespace moe_ext
