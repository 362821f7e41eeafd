// Which rank holds an expert: rank r owns experts rank_expert_offsets[r] : rank_expert_offsets[r + 1].
// Offsets are device data. Whatever they hold, a rank comes out in [0, num_ranks) or as -1, and nothing else is read.
#pragma once

#include <cstdint>

#include "../common/checks.h"
#include "../common/host_device.h"

namespace moe_ext {

MOE_HOST_DEVICE inline int find_interval(const int32_t* offsets, int num_intervals, int64_t value) {
  int low = 0, high = num_intervals;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  // Of several intervals that start here all but the last are empty, and the search ends in the last.
  return value >= offsets[low] && value < offsets[low + 1] ? low : -1;
}

// A token's slots after packing: one for each rank it goes to, at most min(topk, num_ranks).
inline int64_t slots_per_token(int64_t topk, int64_t num_ranks) { return std::min(topk, num_ranks); }

inline int64_t check_rank_expert_offsets(const Tensor& rank_expert_offsets, const Tensor& topk_ids) {
  check_tensor(rank_expert_offsets, "rank_expert_offsets", {ScalarType::Int}, 1, "[num_ranks + 1]");
  MOE_CHECK(rank_expert_offsets.size(0) >= 2,
            "rank_expert_offsets: expected [num_ranks + 1] with at least one rank, got ",
            describe(rank_expert_offsets));
  check_same_device(rank_expert_offsets, "rank_expert_offsets", topk_ids, "topk_ids");
  return rank_expert_offsets.size(0) - 1;
}

inline void check_topk_ids(const Tensor& topk_ids) {
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int, ScalarType::Long}, 2, "[num_tokens, topk]");
  check_at_least(topk_ids.size(1), "topk, the columns of topk_ids", 1);
}

}  // namespace moe_ext
