// routing_plan on CUDA: a stable counting sort, no host sync, integers only. Sizes depend on shapes alone.
// plan_partition.h cuts slots into blocks of consecutive slots, a block's slots into warps of consecutive slots.
//   up to kOneBlockSlots: one launch, scatter_kernel with a single block
//   above: count_kernel   block_counts[B, E], a shared-memory histogram per block
//          scatter_kernel every block counts its slots by warp, adds up the counts of all blocks and of those before
//          it,
//                         scans over experts, and walks its slots 32 at a time; __match_any_sync gives the rank among
//                         equal experts. It also writes its part of the rows that stay empty.
//   with drop_scores the scatter writes slots uncapped into a scratch list, and
//          select_kernel  one block per expert: radix select of the capacity-th score, stable compaction; up to
//                         kCachedKeys slots of an expert the five passes read keys in shared memory
// No block waits for another: a look-back would save the second launch, and deadlock where plans on several streams
// share the machine.
// Traffic: ids read three times (twice if small), from L2 after the first, 4 bytes written per slot and per row, 4*B*E
//   bytes of counts written, and read by every block, from L2. Bound: two launches for few slots, memory for many.
#include "routing_plan.h"

#include <torch/csrc/stable/library.h>

#include "../common/block_select.h"
#include "../common/tensors.h"

namespace moe_ext::cuda {
namespace {

static_assert(kPlanThreads == kSelectThreads && kPlanLanes == kWarpSize);
constexpr int kIdsPerLoad = 4;

struct PlanOutputs {
  int32_t* expert_offsets;
  int32_t* tokens_per_expert;
  int32_t* permuted_to_slot;
  int32_t* slot_to_permuted;
};

template <typename index_t>
__device__ int expert_of(index_t id, int64_t num_experts) {
  return id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
}

// Adds the slots of a warp's range to its counters.
template <typename index_t>
__device__ void count_slots(const index_t* ids, SlotRange range, int num_experts, int* counters) {
  using Ids = Vector<index_t, kIdsPerLoad>;
  const bool aligned = reinterpret_cast<uintptr_t>(ids) % sizeof(Ids) == 0;  // ranges begin at multiples of 32
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 2
  for (int64_t first = range.begin + lane * kIdsPerLoad; first < range.end; first += kWarpSize * kIdsPerLoad) {
    Ids loaded;
    if (aligned && first + kIdsPerLoad <= range.end) {
      loaded = *reinterpret_cast<const Ids*>(ids + first);
    } else {
#pragma unroll
      for (int i = 0; i < kIdsPerLoad; ++i) loaded.values[i] = first + i < range.end ? ids[first + i] : -1;
    }
#pragma unroll
    for (int i = 0; i < kIdsPerLoad; ++i) {
      const int expert = expert_of(loaded.values[i], num_experts);
      if (expert >= 0) atomicAdd(&counters[expert], 1);
    }
  }
}

template <typename index_t>
__global__ void __launch_bounds__(kPlanThreads)
    count_kernel(const index_t* __restrict__ ids, PlanShape shape, int32_t* __restrict__ block_counts) {
  MOE_DYNAMIC_SHARED(int, counters);
  const int num_experts = static_cast<int>(shape.num_experts), warp = threadIdx.x / kWarpSize;
  for (int expert = threadIdx.x; expert < num_experts; expert += kPlanThreads) counters[expert] = 0;
  __syncthreads();
  count_slots(ids, warp_slots(shape.num_slots, gridDim.x, blockIdx.x, kPlanWarps, warp), num_experts, counters);
  __syncthreads();
  int32_t* mine = block_counts + static_cast<int64_t>(blockIdx.x) * num_experts;
  for (int expert = threadIdx.x; expert < num_experts; expert += kPlanThreads) mine[expert] = counters[expert];
}

// Slots of an expert: in all blocks, and in those before this one. Without block_counts this is the only block, and
// counters[w, e] hold its counts. `part` of `parts` neighbouring lanes of a warp share the sums; all get them.
struct ExpertCounts {
  int total, before;
};

__device__ ExpertCounts count_expert(const int32_t* block_counts, const int* counters, int warps, int num_experts,
                                     int expert, int parts, int part) {
  ExpertCounts counts{0, 0};
  if (expert < num_experts && block_counts) {
#pragma unroll 8
    for (int b = part; b < gridDim.x; b += parts) {
      const int here = block_counts[static_cast<int64_t>(b) * num_experts + expert];
      counts.total += here;
      if (b < blockIdx.x) counts.before += here;
    }
  } else if (expert < num_experts) {
    for (int w = part; w < warps; w += parts) counts.total += counters[w * num_experts + expert];
  }
  for (int offset = parts / 2; offset > 0; offset /= 2) {
    counts.total += __shfl_xor_sync(kFullMask, counts.total, offset);
    counts.before += __shfl_xor_sync(kFullMask, counts.before, offset);
  }
  return counts;
}

// -1 in rows begin .. end - 1 of every lane of the warp.
__device__ void fill_padding(int32_t* permuted_to_slot, int begin, int end) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned lanes = __ballot_sync(kFullMask, begin < end);
  while (lanes != 0) {
    const int source = __ffs(static_cast<int>(lanes)) - 1;
    lanes &= lanes - 1;
    const int first = __shfl_sync(kFullMask, begin, source), last = __shfl_sync(kFullMask, end, source);
    for (int row = first + lane; row < last; row += kWarpSize) permuted_to_slot[row] = -1;
  }
}

// With `sorted` the slots go there uncapped, expert e from uncapped_starts[e], else straight into the plan.
template <typename index_t>
__global__ void __launch_bounds__(kPlanThreads)
    scatter_kernel(const index_t* __restrict__ ids, PlanShape shape, const int32_t* __restrict__ block_counts,
                   PlanOutputs out, int32_t* __restrict__ sorted, int32_t* __restrict__ uncapped_starts) {
  MOE_DYNAMIC_SHARED(int, counters);  // [warps, E], then [E]: the first place of every expert
  const int num_experts = static_cast<int>(shape.num_experts), warps = counting_warps(num_experts);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int* starts = counters + warps * num_experts;
  int* cursors = counters + warp * num_experts;
  const SlotRange range = warp_slots(shape.num_slots, gridDim.x, blockIdx.x, warps, min(warp, warps - 1));
  for (int i = threadIdx.x; i < warps * num_experts; i += kPlanThreads) counters[i] = 0;
  __syncthreads();
  if (warp < warps) count_slots(ids, range, num_experts, cursors);
  __syncthreads();

  // Offsets, and from counters to cursors: the place of the warp's next slot of an expert.
  const int parts = threads_per_expert(num_experts), part = threadIdx.x % parts;
  int first_row = 0, first_place = 0;
  for (int first = 0; first < num_experts; first += kPlanThreads / parts) {
    const int expert = first + threadIdx.x / parts;
    const bool owner = part == 0 && expert < num_experts;
    const ExpertCounts counts = count_expert(block_counts, counters, warps, num_experts, expert, parts, part);
    const ExpertRows rows = expert_rows(counts.total, shape.capacity, shape.row_alignment);
    int all_rows, all_places = 0;
    const int row = first_row + block_exclusive_scan(owner ? static_cast<int>(rows.padded) : 0, &all_rows);
    int place = row;
    if (sorted) place = first_place + block_exclusive_scan(owner ? counts.total : 0, &all_places);
    if (owner) {
      starts[expert] = place;
      int next = place + counts.before;
      for (int w = 0; w < warps; ++w) {
        const int count = counters[w * num_experts + expert];
        counters[w * num_experts + expert] = next;
        next += count;
      }
      if (blockIdx.x == 0) {
        out.expert_offsets[expert] = row;
        out.tokens_per_expert[expert] = static_cast<int>(rows.kept);
        if (sorted) uncapped_starts[expert] = place;
      }
    }
    const bool fills = owner && padding_block(expert, gridDim.x) == blockIdx.x;
    fill_padding(out.permuted_to_slot, fills ? row + static_cast<int>(rows.kept) : 0,
                 fills ? row + static_cast<int>(rows.padded) : 0);
    first_row += all_rows;
    first_place += all_places;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    out.expert_offsets[num_experts] = first_row;
    if (sorted) uncapped_starts[num_experts] = first_place;
  }
  const SlotRange tail = tail_rows(first_row, shape.num_rows, gridDim.x, blockIdx.x);
  for (int64_t row = tail.begin + threadIdx.x; row < tail.end; row += kPlanThreads) out.permuted_to_slot[row] = -1;
  __syncthreads();
  if (warp >= warps) return;

#pragma unroll 1
  for (int64_t first = range.begin; first < range.end; first += kIdsPerLoad * kWarpSize) {
    int experts[kIdsPerLoad];
#pragma unroll
    for (int i = 0; i < kIdsPerLoad; ++i) {
      const int64_t slot = first + i * kWarpSize + lane;
      experts[i] = slot < range.end ? expert_of(ids[slot], num_experts) : -1;
    }
#pragma unroll
    for (int i = 0; i < kIdsPerLoad; ++i) {
      const int64_t slot = first + i * kWarpSize + lane;
      const int expert = experts[i];
      const unsigned peers = __match_any_sync(kFullMask, expert);
      const int ahead = __popc(peers & ((1u << lane) - 1));
      const int place = expert >= 0 ? cursors[expert] + ahead : 0;
      __syncwarp();
      if (expert >= 0 && ahead == 0) cursors[expert] = place + __popc(peers);
      __syncwarp();
      if (slot >= range.end) continue;
      int row = -1;  // of a slot that is not here, and, until select_kernel, of every slot
      if (expert >= 0 && sorted) {
        sorted[place] = static_cast<int32_t>(slot);
      } else if (expert >= 0 && place - starts[expert] < shape.capacity) {
        row = place;
        out.permuted_to_slot[row] = static_cast<int32_t>(slot);
      }
      out.slot_to_permuted[slot] = row;
    }
  }
}

__global__ void __launch_bounds__(kPlanThreads)
    select_kernel(const float* __restrict__ scores, const int32_t* __restrict__ sorted,
                  const int32_t* __restrict__ uncapped_starts, PlanShape shape, PlanOutputs out) {
  MOE_DYNAMIC_SHARED(uint32_t, key_cache);
  for (int64_t expert = blockIdx.x; expert < shape.num_experts; expert += gridDim.x) {
    const int32_t* slots = sorted + uncapped_starts[expert];
    const int count = uncapped_starts[expert + 1] - uncapped_starts[expert];
    const int capacity = static_cast<int>(shape.capacity);
    const bool keep_all = count <= capacity;
    int ties = 0;
    const auto key_of_place = [&](int64_t i) { return ordered_key(scores[slots[i]]); };
    const CachedKeys key_of(key_of_place, keep_all ? 0 : count, key_cache);
    const uint32_t threshold = keep_all ? 0 : select_threshold(key_of, count, capacity, &ties);
    int kept = 0, ties_seen = 0;
    for (int first = 0; first < count; first += kPlanThreads) {
      const int i = first + threadIdx.x;
      const uint32_t key = i < count && !keep_all ? key_of(i) : 0;
      const bool tied = i < count && !keep_all && key == threshold;
      int total_ties, total_kept;
      const int tie_rank = ties_seen + block_exclusive_scan(tied, &total_ties);
      const bool keep = i < count && (keep_all || key > threshold || (tied && tie_rank < ties));
      const int rank = kept + block_exclusive_scan(keep, &total_kept);
      if (keep) {
        const int row = out.expert_offsets[expert] + rank;
        out.permuted_to_slot[row] = slots[i];
        out.slot_to_permuted[slots[i]] = row;
      }
      ties_seen += total_ties;
      kept += total_kept;
    }
    __syncthreads();
  }
}

template <typename index_t>
void launch_plan(const Tensor& ids, const std::optional<Tensor>& scores, const PlanShape& shape,
                 const PlanOutputs& out) {
  const cudaStream_t stream = current_stream(ids);
  const index_t* id = ids.const_data_ptr<index_t>();
  const int64_t num_blocks = plan_blocks(shape.num_slots, shape.num_experts);
  const int64_t num_counts = num_blocks > 1 ? num_blocks * shape.num_experts : 0;
  const int64_t num_starts = scores ? shape.num_experts + 1 : 0, num_sorted = scores ? shape.num_slots : 0;
  Tensor scratch = make_tensor(ids, {num_counts + num_starts + num_sorted}, ScalarType::Int);
  int32_t* block_counts = num_blocks > 1 ? scratch.mutable_data_ptr<int32_t>() : nullptr;
  int32_t* uncapped_starts = scores ? scratch.mutable_data_ptr<int32_t>() + num_counts : nullptr;
  int32_t* sorted = scores ? uncapped_starts + num_starts : nullptr;
  const auto blocks = static_cast<unsigned>(num_blocks);
  if (num_blocks > 1) {
    launch_kernel(count_kernel<index_t>, blocks, kPlanThreads, shape.num_experts * sizeof(int), stream, id, shape,
                  block_counts);
  }
  const size_t shared = (counting_warps(shape.num_experts) + 1) * shape.num_experts * sizeof(int);
  launch_kernel(scatter_kernel<index_t>, blocks, kPlanThreads, shared, stream, id, shape, block_counts, out, sorted,
                uncapped_starts);
  if (scores && shape.capacity > 0) {
    const auto experts = static_cast<unsigned>(std::min<int64_t>(shape.num_experts, kMaxBlocks));
    launch_kernel(select_kernel, experts, kPlanThreads, cached_key_bytes(shape.num_slots), stream,
                  scores->const_data_ptr<float>(), sorted, uncapped_starts, shape, out);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> routing_plan(const Tensor& topk_ids, int64_t num_experts,
                                                        std::optional<int64_t> capacity,
                                                        const std::optional<Tensor>& drop_scores,
                                                        int64_t row_alignment) {
  const PlanShape shape = check_routing_plan(topk_ids, num_experts, capacity, drop_scores, row_alignment);
  MOE_CHECK(num_experts <= kMaxPlanExperts, "num_experts: expected at most ", kMaxPlanExperts, " on CUDA, got ",
            num_experts);
  const DeviceGuard guard(topk_ids.get_device_index());
  const Tensor ids = as_contiguous(topk_ids);
  const std::optional<Tensor> scores = as_contiguous(drop_scores);
  const auto make = [&](int64_t size) { return make_tensor(topk_ids, {size}, ScalarType::Int); };
  Tensor expert_offsets = make(num_experts + 1), tokens_per_expert = make(num_experts);
  Tensor permuted_to_slot = make(shape.num_rows), slot_to_permuted = make(shape.num_slots);
  const PlanOutputs out{expert_offsets.mutable_data_ptr<int32_t>(), tokens_per_expert.mutable_data_ptr<int32_t>(),
                        permuted_to_slot.mutable_data_ptr<int32_t>(), slot_to_permuted.mutable_data_ptr<int32_t>()};
  dispatch_index(topk_ids.scalar_type(), "topk_ids",
                 [&](auto tag) { launch_plan<typename decltype(tag)::type>(ids, scores, shape, out); });
  return {expert_offsets, tokens_per_expert, permuted_to_slot, slot_to_permuted};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("routing_plan", TORCH_BOX(&moe_ext::cuda::routing_plan));
}
