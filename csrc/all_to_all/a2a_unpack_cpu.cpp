#include "a2a_unpack.h"

#include <torch/csrc/stable/library.h>

#include "../permutation/permute.h"
#include "../plan/routing_plan.h"

namespace moe_ext::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> a2a_unpack(const Tensor& recv_hidden, const Tensor& recv_ids,
                                                              int64_t num_local_experts, int64_t row_alignment) {
  check_a2a_unpack(recv_hidden, recv_ids);
  auto [expert_offsets, tokens_per_expert, permuted_to_slot, slot_to_permuted] =
      routing_plan(recv_ids, num_local_experts, std::nullopt, std::nullopt, row_alignment);
  Tensor permuted = permute(recv_hidden, permuted_to_slot, slot_to_permuted, recv_ids.size(1));
  return {permuted, expert_offsets, tokens_per_expert, permuted_to_slot, slot_to_permuted};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_unpack", TORCH_BOX(&moe_ext::cpu::a2a_unpack)); }
