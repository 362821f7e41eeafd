// The two row maps of a routing plan, as every op that moves rows takes them.
//   permuted_to_slot [M] int32: flat slot t * topk + j held by row m, -1 for a padding or tail row
//   slot_to_permuted [T * topk] int32: row of slot s, -1 if the slot was dropped
// Both are device data and are trusted no further than this: an entry outside its range counts as -1.
#pragma once

#include "checks.h"

namespace moe_ext {

struct RowMaps {
  int64_t num_rows;    // M
  int64_t num_slots;   // T * topk
  int64_t num_tokens;  // T
  int64_t topk;
};

inline RowMaps check_row_maps(const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, int64_t topk) {
  check_at_least(topk, "topk", 1);
  check_tensor(permuted_to_slot, "permuted_to_slot", {ScalarType::Int}, 1, "[num_rows]");
  check_tensor(slot_to_permuted, "slot_to_permuted", {ScalarType::Int}, 1, "[num_tokens * topk]");
  check_same_device(slot_to_permuted, "slot_to_permuted", permuted_to_slot, "permuted_to_slot");
  const int64_t num_slots = slot_to_permuted.numel();
  MOE_CHECK(num_slots % topk == 0, "slot_to_permuted: expected a length that is a multiple of topk = ", topk, ", got ",
            num_slots);
  return {permuted_to_slot.numel(), num_slots, num_slots / topk, topk};
}

}  // namespace moe_ext
