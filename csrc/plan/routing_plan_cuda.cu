// routing_plan on CUDA: a stable counting sort, no host sync, integers only. Sizes depend on shapes alone.
//
// Slots are cut into blocks of consecutive slots, a block's slots into warps of consecutive slots.
//   small (one launch): a single block counts, scans and scatters.
//   large: count_kernel   block_counts[B, E], shared-memory histograms
//          offsets_kernel one block: scan over B for every expert, then over E: expert_offsets, block_counts -> bases
//          scatter_kernel every warp walks its slots 32 at a time; __match_any_sync gives the rank among equal experts
//   with drop_scores the scatter writes slots uncapped into a scratch list, and
//          select_kernel  one block per expert: radix select of the capacity-th score, stable compaction
// Traffic: ids read twice (once if small), 4 bytes written per slot and per row, 4*B*E bytes of counts read and written
//   twice, B <= kMaxPlanBlocks. Bound: launch latency for small T, memory for large.
#include "routing_plan.h"

#include <torch/csrc/stable/library.h>

#include "../common/block_select.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = kSelectThreads;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSharedCounters = 12000;  // warps * E counters; with the scan's own words under 48 KiB of shared memory
constexpr int64_t kSmallSlots = 16 * 1024;
constexpr int64_t kSlotsPerBlock = 2048;
constexpr int64_t kMaxPlanBlocks = 256;

struct PlanOutputs {
  int32_t* expert_offsets;
  int32_t* tokens_per_expert;
  int32_t* permuted_to_slot;
  int32_t* slot_to_permuted;
};

// From counts to tokens_per_expert and expert_offsets; `counts(e)` are uncapped. One block; all threads must call.
template <typename Counts>
__device__ void write_offsets(const Counts& counts, const PlanShape& shape, const PlanOutputs& out) {
  const int num_experts = static_cast<int>(shape.num_experts);
  int start = 0;
  for (int first = 0; first < num_experts; first += kThreads) {
    const int expert = first + threadIdx.x;
    int kept = 0;
    if (expert < num_experts) {
      kept = static_cast<int>(min(static_cast<int64_t>(counts(expert)), shape.capacity));
      out.tokens_per_expert[expert] = kept;
    }
    int total;
    const int before = block_exclusive_scan(static_cast<int>(round_up(kept, shape.row_alignment)), &total);
    if (expert < num_experts) out.expert_offsets[expert] = start + before;
    start += total;
  }
  if (threadIdx.x == 0) out.expert_offsets[num_experts] = start;
}

// Counters per warp in shared memory: counters[w * E + e]. Warps past `counting_warps` have none and only help
// elsewhere.
__host__ __device__ int counting_warps(int64_t num_experts) {
  const int64_t fitting = kSharedCounters / num_experts;
  return static_cast<int>(fitting < 1 ? 1 : fitting > kWarps ? kWarps : fitting);
}

struct Range {
  int64_t begin, end;
};

// The slots of one warp inside the block's range, a multiple of the warp size but for the last.
__device__ Range warp_range(Range block, int warps, int warp) {
  const int64_t per_warp = ceil_div(ceil_div(block.end - block.begin, warps), kWarpSize) * kWarpSize;
  const int64_t begin = min(block.begin + warp * per_warp, block.end);
  return {begin, min(begin + per_warp, block.end)};
}

template <typename index_t>
__device__ int expert_of(const index_t* ids, int64_t slot, int64_t num_experts) {
  const index_t id = ids[slot];
  return id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
}

// Each warp's histogram of its own slots. Ends with a barrier.
template <typename index_t>
__device__ void count_slots(const index_t* ids, Range block, int num_experts, int* counters) {
  const int warps = counting_warps(num_experts), warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int i = threadIdx.x; i < warps * num_experts; i += kThreads) counters[i] = 0;
  __syncthreads();
  if (warp < warps) {
    const Range range = warp_range(block, warps, warp);
    for (int64_t slot = range.begin + lane; slot < range.end; slot += kWarpSize) {
      const int expert = expert_of(ids, slot, num_experts);
      if (expert >= 0) atomicAdd(&counters[warp * num_experts + expert], 1);
    }
  }
  __syncthreads();
}

// counters[w, e] becomes base(e) + the counts of the warps before w: the warp's next rank in expert e.
template <typename Base>
__device__ void counters_to_cursors(int* counters, int num_experts, const Base& base) {
  const int warps = counting_warps(num_experts);
  for (int expert = threadIdx.x; expert < num_experts; expert += kThreads) {
    int next = base(expert);
    for (int w = 0; w < warps; ++w) {
      const int count = counters[w * num_experts + expert];
      counters[w * num_experts + expert] = next;
      next += count;
    }
  }
  __syncthreads();
}

// Walks the warp's slots in order; store(slot, expert, rank) with the slot's rank among all slots of its expert, or
// store(slot, -1, 0) for a slot that is not here.
template <typename index_t, typename Store>
__device__ void scatter_slots(const index_t* ids, Range block, int num_experts, int* counters, const Store& store) {
  const int warps = counting_warps(num_experts), warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (warp >= warps) return;
  const Range range = warp_range(block, warps, warp);
  int* cursors = counters + warp * num_experts;
  for (int64_t first = range.begin; first < range.end; first += kWarpSize) {
    const int64_t slot = first + lane;
    const bool inside = slot < range.end;
    const int expert = inside ? expert_of(ids, slot, num_experts) : -1;
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int ahead = __popc(peers & ((1u << lane) - 1));
    const int rank = expert >= 0 ? cursors[expert] + ahead : 0;
    __syncwarp();
    if (expert >= 0 && ahead == 0) cursors[expert] += __popc(peers);
    __syncwarp();
    if (inside) store(slot, expert, rank);
  }
}

__device__ void store_row(const PlanShape& shape, const PlanOutputs& out, int64_t slot, int expert, int rank) {
  if (expert >= 0 && rank < shape.capacity) {
    const int row = out.expert_offsets[expert] + rank;
    out.permuted_to_slot[row] = static_cast<int32_t>(slot);
    out.slot_to_permuted[slot] = row;
  } else {
    out.slot_to_permuted[slot] = -1;
  }
}

template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    small_plan_kernel(const index_t* __restrict__ ids, PlanShape shape, PlanOutputs out) {
  MOE_DYNAMIC_SHARED(int, counters);
  const int num_experts = static_cast<int>(shape.num_experts), warps = counting_warps(num_experts);
  for (int64_t row = threadIdx.x; row < shape.num_rows; row += kThreads) out.permuted_to_slot[row] = -1;
  const Range all{0, shape.num_slots};
  count_slots(ids, all, num_experts, counters);
  write_offsets(
      [&](int expert) {
        int sum = 0;
        for (int w = 0; w < warps; ++w) sum += counters[w * num_experts + expert];
        return sum;
      },
      shape, out);
  __syncthreads();  // offsets are written, permuted_to_slot is filled, counters were read
  counters_to_cursors(counters, num_experts, [](int) { return 0; });
  scatter_slots(ids, all, num_experts, counters,
                [&](int64_t slot, int expert, int rank) { store_row(shape, out, slot, expert, rank); });
}

__device__ Range block_range(const PlanShape& shape) {
  const int64_t per_block = ceil_div(ceil_div(shape.num_slots, gridDim.x), kWarpSize) * kWarpSize;
  const int64_t begin = min(blockIdx.x * per_block, shape.num_slots);
  return {begin, min(begin + per_block, shape.num_slots)};
}

template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const index_t* __restrict__ ids, PlanShape shape, int32_t* __restrict__ block_counts) {
  MOE_DYNAMIC_SHARED(int, counters);
  const int num_experts = static_cast<int>(shape.num_experts), warps = counting_warps(num_experts);
  count_slots(ids, block_range(shape), num_experts, counters);
  for (int expert = threadIdx.x; expert < num_experts; expert += kThreads) {
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += counters[w * num_experts + expert];
    block_counts[static_cast<int64_t>(blockIdx.x) * num_experts + expert] = sum;
  }
}

// block_counts[b, e] becomes the slots of expert e before block b; uncapped_starts[e] their scan over experts.
__global__ void __launch_bounds__(kThreads)
    offsets_kernel(int32_t* __restrict__ block_counts, int num_blocks, PlanShape shape, PlanOutputs out,
                   int32_t* __restrict__ uncapped_starts) {
  const int num_experts = static_cast<int>(shape.num_experts);
  int start = 0;
  for (int first = 0; first < num_experts; first += kThreads) {
    const int expert = first + threadIdx.x;
    int sum = 0;
    if (expert < num_experts) {
#pragma unroll 8
      for (int b = 0; b < num_blocks; ++b) {
        int32_t& count = block_counts[static_cast<int64_t>(b) * num_experts + expert];
        const int here = count;
        count = sum;
        sum += here;
      }
    }
    int total;
    const int before = block_exclusive_scan(sum, &total);
    if (expert < num_experts) uncapped_starts[expert] = start + before;
    start += total;
  }
  if (threadIdx.x == 0) uncapped_starts[num_experts] = start;
  __syncthreads();
  write_offsets([&](int expert) { return uncapped_starts[expert + 1] - uncapped_starts[expert]; }, shape, out);
}

// With `sorted` the slots go there uncapped, else straight into the plan.
template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const index_t* __restrict__ ids, PlanShape shape, const int32_t* __restrict__ block_counts,
                   const int32_t* __restrict__ uncapped_starts, PlanOutputs out, int32_t* __restrict__ sorted) {
  MOE_DYNAMIC_SHARED(int, counters);
  const int num_experts = static_cast<int>(shape.num_experts);
  const Range range = block_range(shape);
  count_slots(ids, range, num_experts, counters);
  const int32_t* base = block_counts + static_cast<int64_t>(blockIdx.x) * num_experts;
  counters_to_cursors(counters, num_experts, [&](int expert) { return base[expert]; });
  scatter_slots(ids, range, num_experts, counters, [&](int64_t slot, int expert, int rank) {
    if (!sorted) {
      store_row(shape, out, slot, expert, rank);
    } else if (expert >= 0) {
      sorted[uncapped_starts[expert] + rank] = static_cast<int32_t>(slot);
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    select_kernel(const float* __restrict__ scores, const int32_t* __restrict__ sorted,
                  const int32_t* __restrict__ uncapped_starts, PlanShape shape, PlanOutputs out) {
  for (int64_t expert = blockIdx.x; expert < shape.num_experts; expert += gridDim.x) {
    const int32_t* slots = sorted + uncapped_starts[expert];
    const int count = uncapped_starts[expert + 1] - uncapped_starts[expert];
    const int capacity = static_cast<int>(shape.capacity);
    const bool keep_all = count <= capacity;
    int ties = 0;
    const auto key_of = [&](int64_t i) { return ordered_key(scores[slots[i]]); };
    const uint32_t threshold = keep_all || capacity == 0 ? 0 : select_threshold(key_of, count, capacity, &ties);
    int kept = 0, ties_seen = 0;
    for (int first = 0; capacity > 0 && first < count; first += kThreads) {
      const int i = first + threadIdx.x;
      const uint32_t key = i < count ? key_of(i) : 0;
      const bool tied = i < count && !keep_all && key == threshold;
      int total_ties, total_kept;
      const int tie_rank = ties_seen + block_exclusive_scan(tied, &total_ties);
      const bool keep = i < count && (keep_all || key > threshold || (tied && tie_rank < ties));
      const int rank = kept + block_exclusive_scan(keep, &total_kept);
      if (keep) store_row(shape, out, slots[i], static_cast<int>(expert), rank);
      ties_seen += total_ties;
      kept += total_kept;
    }
    __syncthreads();
  }
}

void fill_with_minus_one(int32_t* values, int64_t count, cudaStream_t stream) {
  if (count > 0) STD_CUDA_CHECK(cudaMemsetAsync(values, 0xff, count * sizeof(int32_t), stream));
}

template <typename index_t>
void launch_plan(const Tensor& ids, const std::optional<Tensor>& scores, const PlanShape& shape,
                 const PlanOutputs& out) {
  const cudaStream_t stream = current_stream(ids);
  const index_t* id = ids.const_data_ptr<index_t>();
  const size_t shared = counting_warps(shape.num_experts) * shape.num_experts * sizeof(int);
  if (!scores && shape.num_slots <= kSmallSlots) {
    launch_kernel(small_plan_kernel<index_t>, 1, kThreads, shared, stream, id, shape, out);
    return;
  }
  const int64_t num_blocks = std::clamp<int64_t>(ceil_div(shape.num_slots, kSlotsPerBlock), 1, kMaxPlanBlocks);
  const int64_t num_counts = num_blocks * shape.num_experts, num_starts = shape.num_experts + 1;
  Tensor scratch =
      torch::stable::new_empty(ids, {num_counts + num_starts + (scores ? shape.num_slots : 0)}, ScalarType::Int);
  int32_t* block_counts = scratch.mutable_data_ptr<int32_t>();
  int32_t* uncapped_starts = block_counts + num_counts;
  int32_t* sorted = scores ? uncapped_starts + num_starts : nullptr;
  // -1 in every row that no slot takes, and, where slots may be dropped later, in every slot.
  fill_with_minus_one(out.permuted_to_slot, shape.num_rows, stream);
  if (scores) fill_with_minus_one(out.slot_to_permuted, shape.num_slots, stream);
  const auto blocks = static_cast<unsigned>(num_blocks);
  launch_kernel(count_kernel<index_t>, blocks, kThreads, shared, stream, id, shape, block_counts);
  launch_kernel(offsets_kernel, 1, kThreads, 0, stream, block_counts, static_cast<int>(num_blocks), shape, out,
                uncapped_starts);
  launch_kernel(scatter_kernel<index_t>, blocks, kThreads, shared, stream, id, shape, block_counts, uncapped_starts,
                out, sorted);
  if (scores) {
    const auto experts = static_cast<unsigned>(std::min<int64_t>(shape.num_experts, kMaxBlocks));
    launch_kernel(select_kernel, experts, kThreads, 0, stream, scores->const_data_ptr<float>(), sorted, uncapped_starts,
                  shape, out);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> routing_plan(const Tensor& topk_ids, int64_t num_experts,
                                                        std::optional<int64_t> capacity,
                                                        const std::optional<Tensor>& drop_scores,
                                                        int64_t row_alignment) {
  const PlanShape shape = check_routing_plan(topk_ids, num_experts, capacity, drop_scores, row_alignment);
  MOE_CHECK(num_experts <= kSharedCounters, "num_experts: expected at most ", kSharedCounters, " on CUDA, got ",
            num_experts);
  const DeviceGuard guard(topk_ids.get_device_index());
  const Tensor ids = torch::stable::contiguous(topk_ids);
  const std::optional<Tensor> scores =
      drop_scores.has_value() ? std::optional(torch::stable::contiguous(*drop_scores)) : std::nullopt;
  const auto make = [&](int64_t size) { return torch::stable::new_empty(topk_ids, {size}, ScalarType::Int); };
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
