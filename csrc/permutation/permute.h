// permute: rows in token order [T, H] -> rows in expert order [M, H]; padding and tail rows are zero.
#pragma once

#include "../common/dtypes.h"
#include "../common/row_maps.h"

namespace moe_ext {

inline RowMaps check_permute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                             int64_t topk) {
  const RowMaps maps = check_row_maps(permuted_to_slot, slot_to_permuted, topk);
  check_tensor(input, "input", {MOE_FLOATING}, 2, "[num_tokens, hidden_size]");
  check_size(input, "input", 0, maps.num_tokens, "num_tokens, the length of slot_to_permuted / topk");
  check_same_device(permuted_to_slot, "permuted_to_slot", input, "input");
  return maps;
}

namespace cpu {
Tensor permute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, int64_t topk);
}
namespace cuda {
Tensor permute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, int64_t topk);
}

}  // namespace moe_ext
