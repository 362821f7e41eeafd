#include "a2a_combine.h"

#include <torch/csrc/stable/library.h>

#include "../permutation/unpermute.h"

namespace moe_ext::cpu {

Tensor a2a_combine(const Tensor& recv_rows, const Tensor& send_to_slot, const Tensor& slot_to_send,
                   int64_t slots_per_token) {
  check_a2a_combine(recv_rows, send_to_slot, slot_to_send, slots_per_token);
  return unpermute(recv_rows, send_to_slot, slot_to_send, std::nullopt, slots_per_token);
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_combine", TORCH_BOX(&moe_ext::cpu::a2a_combine)); }
