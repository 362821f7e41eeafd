#include "a2a_plan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/tensors.h"
#include "../plan/routing_plan.h"

namespace moe_ext::cpu {

namespace {

constexpr int64_t kMostTabulated = 4096;  // experts whose ranks are looked up in a table; beyond it they are searched
constexpr int64_t kBytesPerSlot = 16;     // a look-up costs about this many bytes' worth of copying

// The ranks of experts 0 ... of a table, where the offsets allow one.
std::vector<int32_t> tabulate_ranks(const int32_t* offsets, int64_t num_ranks) {
  const int64_t num_experts = offsets[num_ranks];
  std::vector<int32_t> ranks(num_experts > 0 && num_experts <= kMostTabulated ? num_experts : 0);
  for (size_t expert = 0; expert < ranks.size(); ++expert) {
    ranks[expert] = find_interval(offsets, static_cast<int>(num_ranks), static_cast<int64_t>(expert));
  }
  return ranks;
}

// The ranks of one token, ascending, each once; -1 in the slots left over. `goes`, a bit for each rank, is scratch: all
// zero.
void write_ranks(const int32_t* ranks, int64_t topk, int64_t num_ranks, int64_t slots, uint64_t* goes, int32_t* row) {
  for (int64_t j = 0; j < topk; ++j) {
    if (ranks[j] >= 0) goes[ranks[j] / 64] |= uint64_t{1} << ranks[j] % 64;
  }
  int64_t found = 0;
  for (int64_t word = 0; word * 64 < num_ranks; ++word) {
    for (uint64_t bits = goes[word]; bits; bits &= bits - 1) {
      row[found++] = static_cast<int32_t>(word * 64 + std::countr_zero(bits));
    }
    goes[word] = 0;
  }
  std::fill(row + found, row + slots, -1);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> a2a_plan(const Tensor& topk_ids, const Tensor& rank_expert_offsets) {
  const int64_t num_ranks = check_a2a_plan(topk_ids, rank_expert_offsets);
  const int64_t num_tokens = topk_ids.size(0), topk = topk_ids.size(1), slots = slots_per_token(topk, num_ranks);
  const Tensor ids = as_contiguous(topk_ids), owners = as_contiguous(rank_expert_offsets);
  Tensor rank_ids = make_tensor(topk_ids, {num_tokens, slots}, ScalarType::Int);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    const auto* id = ids.const_data_ptr<typename decltype(tag)::type>();
    const auto* offsets = owners.const_data_ptr<int32_t>();
    auto* destination = rank_ids.mutable_data_ptr<int32_t>();
    const std::vector<int32_t> table = tabulate_ranks(offsets, num_ranks);
    parallel_rows(num_tokens, topk * kBytesPerSlot, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> ranks(topk);
      std::vector<uint64_t> goes((num_ranks + 63) / 64);
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t j = 0; j < topk; ++j) {
          const int64_t expert = id[token * topk + j];
          ranks[j] = expert >= 0 && expert < static_cast<int64_t>(table.size())
                         ? table[expert]
                         : find_interval(offsets, static_cast<int>(num_ranks), expert);
        }
        write_ranks(ranks.data(), topk, num_ranks, slots, goes.data(), destination + token * slots);
      }
    });
  });
  auto [send_offsets, send_counts, send_to_slot, slot_to_send] =
      routing_plan(rank_ids, num_ranks, std::nullopt, std::nullopt, 1);
  return {send_counts, send_offsets, send_to_slot, slot_to_send};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_plan", TORCH_BOX(&moe_ext::cpu::a2a_plan)); }
