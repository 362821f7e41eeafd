#include "a2a_pack.h"

#include <torch/csrc/stable/library.h>

#include "../common/cpu_parallel.h"
#include "../permutation/permute.h"
#include "../permutation/unpermute.h"

namespace moe_ext::cpu {

std::tuple<Tensor, Tensor, Tensor> a2a_pack(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights,
                                            const Tensor& rank_expert_offsets, const Tensor& send_offsets,
                                            const Tensor& send_to_slot, const Tensor& slot_to_send) {
  const PackShape shape =
      check_a2a_pack(hidden, topk_ids, topk_weights, rank_expert_offsets, send_offsets, send_to_slot, slot_to_send);
  Tensor send_hidden = permute(hidden, send_to_slot, slot_to_send, shape.slots);
  const Tensor ids = torch::stable::contiguous(topk_ids), weights = torch::stable::contiguous(topk_weights);
  const Tensor owners = torch::stable::contiguous(rank_expert_offsets),
               starts = torch::stable::contiguous(send_offsets);
  const Tensor slots = torch::stable::contiguous(send_to_slot);
  Tensor send_ids = torch::stable::new_empty(topk_ids, {shape.num_rows, shape.topk}, ScalarType::Int);
  Tensor send_weights = torch::stable::new_empty(topk_weights, {shape.num_rows, shape.topk});
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    dispatch_floating(topk_weights.scalar_type(), "topk_weights", [&](auto tag) {
      using weight_t = typename decltype(tag)::type;
      const auto* id = ids.const_data_ptr<typename decltype(index_tag)::type>();
      const auto* weight = weights.const_data_ptr<weight_t>();
      auto* id_out = send_ids.mutable_data_ptr<int32_t>();
      auto* weight_out = send_weights.mutable_data_ptr<weight_t>();
      parallel_rows(shape.num_rows, shape.topk * 64, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t j = 0; j < shape.topk; ++j) {
            pack_entry(row, j, id, weight, owners.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(),
                       slots.const_data_ptr<int32_t>(), shape, id_out, weight_out);
          }
        }
      });
    });
  });
  return {send_hidden, send_ids, send_weights};
}

std::tuple<Tensor, Tensor> a2a_pack_backward(const Tensor& grad_send_hidden, const Tensor& grad_send_weights,
                                             const Tensor& topk_ids, const Tensor& rank_expert_offsets,
                                             const Tensor& send_offsets, const Tensor& send_to_slot,
                                             const Tensor& slot_to_send) {
  const PackShape shape = check_a2a_pack_backward(grad_send_hidden, grad_send_weights, topk_ids, rank_expert_offsets,
                                                  send_offsets, send_to_slot, slot_to_send);
  Tensor grad_hidden = unpermute(grad_send_hidden, send_to_slot, slot_to_send, std::nullopt, shape.slots);
  const Tensor ids = torch::stable::contiguous(topk_ids), grads = torch::stable::contiguous(grad_send_weights);
  const Tensor owners = torch::stable::contiguous(rank_expert_offsets),
               starts = torch::stable::contiguous(send_offsets);
  const Tensor rows = torch::stable::contiguous(slot_to_send);
  Tensor grad_weights = torch::stable::new_empty(grad_send_weights, {shape.num_tokens, shape.topk});
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    dispatch_floating(grad_send_weights.scalar_type(), "grad_send_weights", [&](auto tag) {
      using weight_t = typename decltype(tag)::type;
      const auto* id = ids.const_data_ptr<typename decltype(index_tag)::type>();
      const auto* grad = grads.const_data_ptr<weight_t>();
      auto* grad_out = grad_weights.mutable_data_ptr<weight_t>();
      parallel_rows(shape.num_tokens, shape.topk * 64, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
          for (int64_t j = 0; j < shape.topk; ++j) {
            grad_out[token * shape.topk + j] =
                weight_gradient(token, j, id, owners.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(),
                                rows.const_data_ptr<int32_t>(), shape, grad);
          }
        }
      });
    });
  });
  return {grad_hidden, grad_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("a2a_pack", TORCH_BOX(&moe_ext::cpu::a2a_pack));
  m.impl("a2a_pack_backward", TORCH_BOX(&moe_ext::cpu::a2a_pack_backward));
}
