// unpermute: rows in expert order [M, H] -> the (weighted) sum of each token's rows [T, H], summed in fp32, rounded
// once. unpermute_backward: its gradients to the rows and to the weights, in one pass.
#pragma once

#include <tuple>

#include "../common/dtypes.h"
#include "../common/row_maps.h"

namespace moe_ext {

inline void check_topk_weights(const Tensor& topk_weights, const Tensor& rows, const char* rows_name,
                               const RowMaps& maps) {
  check_tensor(topk_weights, "topk_weights", {router_dtype(rows.scalar_type())}, 2, "[num_tokens, topk]");
  check_size(topk_weights, "topk_weights", 0, maps.num_tokens, "num_tokens, the length of slot_to_permuted / topk");
  check_size(topk_weights, "topk_weights", 1, maps.topk, "topk");
  check_same_device(topk_weights, "topk_weights", rows, rows_name);
}

inline RowMaps check_unpermute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                               const std::optional<Tensor>& topk_weights, int64_t topk) {
  const RowMaps maps = check_row_maps(permuted_to_slot, slot_to_permuted, topk);
  check_tensor(input, "input", {MOE_FLOATING}, 2, "[num_rows, hidden_size]");
  check_size(input, "input", 0, maps.num_rows, "num_rows, the length of permuted_to_slot");
  check_same_device(permuted_to_slot, "permuted_to_slot", input, "input");
  if (topk_weights.has_value()) check_topk_weights(*topk_weights, input, "input", maps);
  return maps;
}

inline RowMaps check_unpermute_backward(const Tensor& grad_output, const Tensor& input, const Tensor& permuted_to_slot,
                                        const Tensor& slot_to_permuted, const Tensor& topk_weights) {
  check_tensor(topk_weights, "topk_weights", {router_dtype(input.scalar_type())}, 2, "[num_tokens, topk]");
  const RowMaps maps = check_unpermute(input, permuted_to_slot, slot_to_permuted, topk_weights, topk_weights.size(1));
  check_tensor(grad_output, "grad_output", {input.scalar_type()}, 2, "[num_tokens, hidden_size]");
  check_size(grad_output, "grad_output", 0, maps.num_tokens, "num_tokens");
  check_size(grad_output, "grad_output", 1, input.size(1), "hidden_size, as in input");
  check_same_device(grad_output, "grad_output", input, "input");
  return maps;
}

#define MOE_DECLARE_UNPERMUTE                                                                                   \
  Tensor unpermute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,         \
                   const std::optional<Tensor>& topk_weights, int64_t topk);                                    \
  std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_output, const Tensor& input,                 \
                                                const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, \
                                                const Tensor& topk_weights);
namespace cpu {
MOE_DECLARE_UNPERMUTE
}
namespace cuda {
MOE_DECLARE_UNPERMUTE
}
#undef MOE_DECLARE_UNPERMUTE

}  // namespace moe_ext
