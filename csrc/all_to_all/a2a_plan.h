// a2a_plan: which rows go to which rank. A token goes to each rank once, whatever the number of its experts there.
// The ranks of a token, ascending, are its slots; sorting slots by rank is a routing plan over ranks.
#pragma once

#include <tuple>

#include "../common/dtypes.h"
#include "ranks.h"

namespace moe_ext {

inline int64_t check_a2a_plan(const Tensor& topk_ids, const Tensor& rank_expert_offsets) {
  check_topk_ids(topk_ids);
  return check_rank_expert_offsets(rank_expert_offsets, topk_ids);
}

#define MOE_DECLARE_A2A_PLAN \
  std::tuple<Tensor, Tensor, Tensor, Tensor> a2a_plan(const Tensor& topk_ids, const Tensor& rank_expert_offsets);
namespace cpu {
MOE_DECLARE_A2A_PLAN
}
namespace cuda {
MOE_DECLARE_A2A_PLAN
}
#undef MOE_DECLARE_A2A_PLAN

}  // namespace moe_ext
