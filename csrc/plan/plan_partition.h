// Which block, warp and lane of the routing plan's kernels owns which slots and rows. Plain C++, tested on the CPU.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace moe_ext {

constexpr int kPlanThreads = 512;
constexpr int kPlanLanes = 32;
constexpr int kPlanWarps = kPlanThreads / kPlanLanes;
// Words of shared memory for the counters of each warp and the offsets; with the scan's own words under 48 KiB.
constexpr int64_t kPlanSharedWords = 12000;
constexpr int64_t kMaxPlanExperts = kPlanSharedWords / 2;
// Up to here one block does it all in one launch; above, a second launch costs less than a longer block.
constexpr int64_t kOneBlockSlots = 8 * 1024;
constexpr int64_t kSlotsPerPlanBlock = 1024;
constexpr int64_t kMaxPlanBlocks = 128;
// Every block of the second launch reads the counts of all blocks: 128 KiB, a microsecond or two from L2.
constexpr int64_t kMaxBlockCounts = 32 * 1024;

MOE_HOST_DEVICE constexpr int64_t plan_min(int64_t a, int64_t b) { return a < b ? a : b; }
MOE_HOST_DEVICE constexpr int64_t plan_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

MOE_HOST_DEVICE constexpr int64_t round_up(int64_t rows, int64_t alignment) {
  return plan_ceil(rows, alignment) * alignment;
}

inline int64_t plan_blocks(int64_t num_slots, int64_t num_experts) {
  if (num_slots <= kOneBlockSlots) return 1;
  const int64_t most = plan_min(kMaxPlanBlocks, kMaxBlockCounts / num_experts);
  const int64_t blocks = plan_min(plan_ceil(num_slots, kSlotsPerPlanBlock), most);
  return blocks < 1 ? 1 : blocks;
}

// Warps that have counters of their own, one per expert; the others only help elsewhere.
MOE_HOST_DEVICE constexpr int counting_warps(int64_t num_experts) {
  const int64_t fitting = kPlanSharedWords / num_experts - 1;  // one part is for the offsets
  return static_cast<int>(fitting < 1 ? 1 : plan_min(fitting, kPlanWarps));
}

// Threads that share the sums of one expert over the blocks: a power of two, so that they are lanes of one warp.
MOE_HOST_DEVICE constexpr int threads_per_expert(int64_t num_experts) {
  int threads = 1;
  while (threads < kPlanLanes && 2 * threads * num_experts <= kPlanThreads) threads *= 2;
  return threads;
}

struct SlotRange {
  int64_t begin, end;
};

// Part `index` of `parts` consecutive parts of a range; all but the last a multiple of the warp size long, some empty.
MOE_HOST_DEVICE constexpr SlotRange part_of(SlotRange all, int64_t parts, int64_t index) {
  const int64_t each = round_up(plan_ceil(all.end - all.begin, parts), kPlanLanes);
  const int64_t begin = plan_min(all.begin + index * each, all.end);
  return {begin, plan_min(begin + each, all.end)};
}

MOE_HOST_DEVICE constexpr SlotRange block_slots(int64_t num_slots, int64_t num_blocks, int64_t block) {
  return part_of({0, num_slots}, num_blocks, block);
}

MOE_HOST_DEVICE constexpr SlotRange warp_slots(int64_t num_slots, int64_t num_blocks, int64_t block, int warps,
                                               int warp) {
  return part_of(block_slots(num_slots, num_blocks, block), warps, warp);
}

// An expert's rows: those that slots take, then padding.
struct ExpertRows {
  int64_t kept, padded;
};

MOE_HOST_DEVICE constexpr ExpertRows expert_rows(int64_t count, int64_t capacity, int64_t row_alignment) {
  const int64_t kept = plan_min(count, capacity);
  return {kept, round_up(kept, row_alignment)};
}

// The block that fills an expert's padding rows, and the rows past the last expert that a block fills.
MOE_HOST_DEVICE constexpr int64_t padding_block(int64_t expert, int64_t num_blocks) { return expert % num_blocks; }
MOE_HOST_DEVICE constexpr SlotRange tail_rows(int64_t first_row, int64_t num_rows, int64_t num_blocks, int64_t block) {
  return part_of({plan_min(first_row, num_rows), num_rows}, num_blocks, block);
}

}  // namespace moe_ext
