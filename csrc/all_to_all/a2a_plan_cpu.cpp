#include "a2a_plan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../plan/routing_plan.h"

namespace moe_ext::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> a2a_plan(const Tensor& topk_ids, const Tensor& rank_expert_offsets) {
  const int64_t num_ranks = check_a2a_plan(topk_ids, rank_expert_offsets);
  const int64_t num_tokens = topk_ids.size(0), topk = topk_ids.size(1), slots = slots_per_token(topk, num_ranks);
  const Tensor ids = torch::stable::contiguous(topk_ids), owners = torch::stable::contiguous(rank_expert_offsets);
  Tensor rank_ids = torch::stable::new_empty(topk_ids, {num_tokens, slots}, ScalarType::Int);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    const auto* id = ids.const_data_ptr<typename decltype(tag)::type>();
    const auto* offsets = owners.const_data_ptr<int32_t>();
    auto* destination = rank_ids.mutable_data_ptr<int32_t>();
    parallel_rows(num_tokens, topk * 64, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> ranks(topk);
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t j = 0; j < topk; ++j) {
          ranks[j] = find_interval(offsets, static_cast<int>(num_ranks), id[token * topk + j]);
        }
        std::sort(ranks.begin(), ranks.end());
        int32_t* row = destination + token * slots;
        int64_t found = 0;
        for (int64_t j = 0; j < topk; ++j) {
          if (ranks[j] >= 0 && (j == 0 || ranks[j] != ranks[j - 1])) row[found++] = ranks[j];
        }
        std::fill(row + found, row + slots, -1);
      }
    });
  });
  auto [send_offsets, send_counts, send_to_slot, slot_to_send] =
      routing_plan(rank_ids, num_ranks, std::nullopt, std::nullopt, 1);
  return {send_counts, send_offsets, send_to_slot, slot_to_send};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_plan", TORCH_BOX(&moe_ext::cpu::a2a_plan)); }
