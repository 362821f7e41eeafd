// A stable counting sort: slots are cut into chunks, each chunk counts, a scan over (expert, chunk) gives each chunk
// its first row, each chunk scatters: into the maps, or, where scores decide who is dropped, into a list of each
// expert's slots that is cut first. The result does not depend on the number of threads.
#include "routing_plan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/dtypes.h"
#include "../common/tensors.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kSlotsPerChunk = 8 * 1024;

template <typename index_t>
bool is_here(index_t expert, int64_t num_experts) {
  return expert >= 0 && expert < num_experts;
}

// first[c * E + e] = how many slots of expert e lie before chunk c; the last row holds the totals.
template <typename index_t>
std::vector<int32_t> count_chunks(const index_t* ids, const PlanShape& shape, int64_t num_chunks) {
  const int64_t num_experts = shape.num_experts;
  std::vector<int32_t> first((num_chunks + 1) * num_experts, 0);
  parallel_rows(num_chunks, kBytesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* counts = first.data() + (chunk + 1) * num_experts;
      const int64_t last = std::min(shape.num_slots, (chunk + 1) * kSlotsPerChunk);
      for (int64_t slot = chunk * kSlotsPerChunk; slot < last; ++slot) {
        if (is_here(ids[slot], num_experts)) ++counts[ids[slot]];
      }
    }
  });
  for (int64_t i = num_experts; i < static_cast<int64_t>(first.size()); ++i) first[i] += first[i - num_experts];
  return first;
}

// Slots of each expert in slot order, expert after expert, before any drop.
template <typename index_t>
std::vector<int32_t> sort_slots(const index_t* ids, const PlanShape& shape, std::vector<int32_t>& first,
                                const std::vector<int64_t>& starts, int64_t num_chunks) {
  std::vector<int32_t> sorted(starts.back());
  parallel_rows(num_chunks, kBytesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* cursor = first.data() + chunk * shape.num_experts;
      const int64_t last = std::min(shape.num_slots, (chunk + 1) * kSlotsPerChunk);
      for (int64_t slot = chunk * kSlotsPerChunk; slot < last; ++slot) {
        if (!is_here(ids[slot], shape.num_experts)) continue;
        sorted[starts[ids[slot]] + cursor[ids[slot]]++] = static_cast<int32_t>(slot);
      }
    }
  });
  return sorted;
}

// Moves the `capacity` slots with the highest scores to the front, in slot order; equal scores keep the earlier slot.
void keep_best(int32_t* slots, int64_t count, int64_t capacity, const float* scores) {
  std::nth_element(slots, slots + capacity, slots + count, [&](int32_t a, int32_t b) {
    const uint32_t key_a = ordered_key(scores[a]), key_b = ordered_key(scores[b]);
    return key_a != key_b ? key_a > key_b : a < b;
  });
  std::sort(slots, slots + capacity);
}

// Padding rows of each expert and the tail hold no slot.
void clear_unused_rows(const int32_t* expert_offsets, const int32_t* tokens_per_expert, const PlanShape& shape,
                       int32_t* permuted_to_slot) {
  for (int64_t expert = 0; expert < shape.num_experts; ++expert) {
    std::fill(permuted_to_slot + expert_offsets[expert] + tokens_per_expert[expert],
              permuted_to_slot + expert_offsets[expert + 1], -1);
  }
  std::fill(permuted_to_slot + expert_offsets[shape.num_experts], permuted_to_slot + shape.num_rows, -1);
}

// Every expert keeps its first slots. `first` becomes the cursors.
template <typename index_t>
void place_slots(const index_t* ids, const PlanShape& shape, std::vector<int32_t>& first, int64_t num_chunks,
                 const int32_t* expert_offsets, const int32_t* tokens_per_expert, int32_t* permuted_to_slot,
                 int32_t* slot_to_permuted) {
  parallel_rows(num_chunks, kBytesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int32_t* cursor = first.data() + chunk * shape.num_experts;
      const int64_t last = std::min(shape.num_slots, (chunk + 1) * kSlotsPerChunk);
      for (int64_t slot = chunk * kSlotsPerChunk; slot < last; ++slot) {
        slot_to_permuted[slot] = -1;
        const index_t expert = ids[slot];
        if (!is_here(expert, shape.num_experts)) continue;
        const int32_t place = cursor[expert]++;
        if (place >= tokens_per_expert[expert]) continue;
        const int32_t row = expert_offsets[expert] + place;
        slot_to_permuted[slot] = row;
        permuted_to_slot[row] = static_cast<int32_t>(slot);
      }
    }
  });
}

// Every expert keeps its slots with the highest scores.
template <typename index_t>
void place_best_slots(const index_t* ids, const float* scores, const PlanShape& shape, std::vector<int32_t>& first,
                      int64_t num_chunks, const int32_t* expert_offsets, const int32_t* tokens_per_expert,
                      int32_t* permuted_to_slot, int32_t* slot_to_permuted) {
  const int32_t* totals = first.data() + num_chunks * shape.num_experts;
  std::vector<int64_t> starts(shape.num_experts + 1, 0);
  for (int64_t expert = 0; expert < shape.num_experts; ++expert) starts[expert + 1] = starts[expert] + totals[expert];
  std::vector<int32_t> sorted = sort_slots(ids, shape, first, starts, num_chunks);
  std::fill_n(slot_to_permuted, shape.num_slots, -1);
  const int64_t bytes_per_expert = 12 * (1 + static_cast<int64_t>(sorted.size()) / shape.num_experts);
  parallel_rows(shape.num_experts, bytes_per_expert, [&](int64_t begin, int64_t end) {
    for (int64_t expert = begin; expert < end; ++expert) {
      int32_t* slots = sorted.data() + starts[expert];
      const int64_t count = starts[expert + 1] - starts[expert];
      if (count > shape.capacity) keep_best(slots, count, shape.capacity, scores);
      for (int64_t i = 0; i < tokens_per_expert[expert]; ++i) {
        const int32_t row = expert_offsets[expert] + static_cast<int32_t>(i);
        permuted_to_slot[row] = slots[i];
        slot_to_permuted[slots[i]] = row;
      }
    }
  });
}

template <typename index_t>
void plan(const index_t* ids, const float* scores, const PlanShape& shape, int32_t* expert_offsets,
          int32_t* tokens_per_expert, int32_t* permuted_to_slot, int32_t* slot_to_permuted) {
  const int64_t num_chunks = (shape.num_slots + kSlotsPerChunk - 1) / kSlotsPerChunk;
  std::vector<int32_t> first = count_chunks(ids, shape, num_chunks);
  const int32_t* totals = first.data() + num_chunks * shape.num_experts;
  expert_offsets[0] = 0;
  for (int64_t expert = 0; expert < shape.num_experts; ++expert) {
    tokens_per_expert[expert] = static_cast<int32_t>(std::min<int64_t>(totals[expert], shape.capacity));
    expert_offsets[expert + 1] =
        expert_offsets[expert] + static_cast<int32_t>(round_up(tokens_per_expert[expert], shape.row_alignment));
  }
  clear_unused_rows(expert_offsets, tokens_per_expert, shape, permuted_to_slot);
  if (scores) {
    place_best_slots(ids, scores, shape, first, num_chunks, expert_offsets, tokens_per_expert, permuted_to_slot,
                     slot_to_permuted);
  } else {
    place_slots(ids, shape, first, num_chunks, expert_offsets, tokens_per_expert, permuted_to_slot, slot_to_permuted);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> routing_plan(const Tensor& topk_ids, int64_t num_experts,
                                                        std::optional<int64_t> capacity,
                                                        const std::optional<Tensor>& drop_scores,
                                                        int64_t row_alignment) {
  const PlanShape shape = check_routing_plan(topk_ids, num_experts, capacity, drop_scores, row_alignment);
  const Tensor ids = as_contiguous(topk_ids);
  const std::optional<Tensor> scores = as_contiguous(drop_scores);
  const auto make = [&](int64_t size) { return make_tensor(topk_ids, {size}, ScalarType::Int); };
  Tensor expert_offsets = make(num_experts + 1), tokens_per_expert = make(num_experts);
  Tensor permuted_to_slot = make(shape.num_rows), slot_to_permuted = make(shape.num_slots);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    using index_t = typename decltype(tag)::type;
    plan(ids.const_data_ptr<index_t>(), scores ? scores->const_data_ptr<float>() : nullptr, shape,
         expert_offsets.mutable_data_ptr<int32_t>(), tokens_per_expert.mutable_data_ptr<int32_t>(),
         permuted_to_slot.mutable_data_ptr<int32_t>(), slot_to_permuted.mutable_data_ptr<int32_t>());
  });
  return {expert_offsets, tokens_per_expert, permuted_to_slot, slot_to_permuted};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("routing_plan", TORCH_BOX(&moe_ext::cpu::routing_plan)); }
