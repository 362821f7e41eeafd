// One token's row of experts spread over a group of lanes; where experts are few, several tokens share a warp.
// Up to kMaxRegisterExperts the row lies in registers, loaded as vectors of four where rows are aligned: a warp then
// spends one exchange on several tokens. Above, per_lane is 0, a token has a whole warp, and the row is read from
// memory, in practice from the caches, at every use.
#pragma once

#include <cfloat>
#include <type_traits>

#include "../common/block_select.h"
#include "scores.h"

namespace moe_ext::cuda {

constexpr int kGateWarps = 4;
constexpr int kGateThreads = kGateWarps * kWarpSize;
constexpr int64_t kMaxRegisterExperts = 1024;
constexpr int kRowVector = 4;
// Bounds the workspace of kernels that keep one row per warp in memory.
constexpr int64_t kMaxWideBlocks = 512;

template <int lanes_, int per_lane_, int width_>
struct RowLayout {
  static constexpr int lanes = lanes_, per_lane = per_lane_, width = width_;
  static constexpr int rows_per_warp = kWarpSize / lanes;
  static constexpr int rows_per_block = kGateWarps * rows_per_warp;
  static constexpr bool wide = per_lane == 0;
  // Blocks per multiprocessor that launch bounds ask for: few, since without a number ptxas spills a register or two to
  // get the next block in.
  static constexpr int blocks = per_lane == 32 && width == 1 ? 2 : 3;

  __device__ static int lane() { return threadIdx.x % lanes; }
  __device__ static int row_of_block() { return threadIdx.x / lanes; }
  __device__ static int row_of_warp() { return threadIdx.x % kWarpSize / lanes; }
  // The row of this group; warps without a row leave at once, groups without one stay for the warp's collectives.
  __device__ static int64_t first_token() { return static_cast<int64_t>(blockIdx.x) * rows_per_block + row_of_block(); }
  // Element i of a lane.
  __device__ static int expert(int i, int lane) { return (i / width * lanes + lane) * width + i % width; }
};

// ---- collectives of a group of lanes; the whole warp must call, in whatever state its groups are

template <int lanes>
__device__ uint32_t group_max(uint32_t value) {
  if constexpr (lanes == kWarpSize) {
    return __reduce_max_sync(kFullMask, value);
  } else {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      value = max(value, __shfl_xor_sync(kFullMask, value, offset));
    }
    return value;
  }
}

// No NaN may come.
template <int lanes>
__device__ float group_max(float value) {
  if constexpr (lanes == kWarpSize) {
    const uint32_t key = group_max<lanes>(ordered_key(value));
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
  } else {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
    }
    return value;
  }
}

template <int lanes>
__device__ float group_sum(float value) {
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// The lowest lane of the group whose predicate holds; lanes if there is none.
template <int lanes>
__device__ int first_lane(bool predicate) {
  unsigned ballot = __ballot_sync(kFullMask, predicate);
  if constexpr (lanes < kWarpSize) ballot = ballot >> (threadIdx.x % kWarpSize / lanes * lanes) & ((1u << lanes) - 1);
  return ballot == 0 ? lanes : __ffs(static_cast<int>(ballot)) - 1;
}

// ---- the row

// `allowed` is false past the last expert, so that loops over count() need no other bound. A lane of a group without a
// token passes num_experts = 0.
template <typename scalar_t, typename Layout, bool wide = Layout::wide>
struct ExpertRow {
  static_assert(Layout::per_lane <= 32 && Layout::per_lane % Layout::width == 0);
  float logits[Layout::per_lane];
  uint32_t mask = 0;

  __device__ ExpertRow(const scalar_t* row, const bool* expert_mask, int num_experts) {
    using Packed = Vector<scalar_t, Layout::width>;
    constexpr uint32_t kVectorBits = (1u << Layout::width) - 1;
#pragma unroll
    for (int i = 0; i < Layout::per_lane; i += Layout::width) {
      const int first = Layout::expert(i, Layout::lane());
      Packed values{};
      if (first < num_experts) {
        values = *reinterpret_cast<const Packed*>(row + first);
        mask |= kVectorBits << i;
      }
#pragma unroll
      for (int k = 0; k < Layout::width; ++k) {
        logits[i + k] = static_cast<float>(values.values[k]);
        if (expert_mask && first < num_experts && !expert_mask[first + k]) mask &= ~(1u << (i + k));
      }
    }
  }
  __device__ static constexpr int count() { return Layout::per_lane; }
  __device__ float logit(int i) const { return logits[i]; }
  __device__ bool allowed(int i) const { return mask >> i & 1; }
};

template <typename scalar_t, typename Layout>
struct ExpertRow<scalar_t, Layout, true> {
  const scalar_t* row;
  const bool* expert_mask;
  int num_experts;

  __device__ ExpertRow(const scalar_t* row, const bool* expert_mask, int num_experts)
      : row(row), expert_mask(expert_mask), num_experts(num_experts) {}
  __device__ int count() const { return (num_experts + kWarpSize - 1) / kWarpSize; }
  __device__ float logit(int i) const {
    const int expert = Layout::expert(i, Layout::lane());
    return expert < num_experts ? static_cast<float>(row[expert]) : 0.f;
  }
  __device__ bool allowed(int i) const {
    const int expert = Layout::expert(i, Layout::lane());
    return expert < num_experts && (!expert_mask || expert_mask[expert]);
  }
};

// One value per expert of a row: in registers, or in the warp's row of a workspace, where a lane meets only its own.
template <typename T, int per_lane>
struct LaneValues {
  T values[per_lane];
  __device__ LaneValues(T*, int) {}
  __device__ T& operator[](int i) { return values[i]; }
  __device__ T operator[](int i) const { return values[i]; }
};

template <typename T>
struct LaneValues<T, 0> {
  T* values;
  __device__ LaneValues(T* workspace_row, int lane) : values(workspace_row + lane) {}
  __device__ T& operator[](int i) { return values[static_cast<int64_t>(i) * kWarpSize]; }
  __device__ T operator[](int i) const { return values[static_cast<int64_t>(i) * kWarpSize]; }
};

// The length of a workspace row: whole lanes.
inline int64_t workspace_row(int64_t num_experts) { return ceil_div(num_experts, kWarpSize) * kWarpSize; }

// Stores value(i) for the elements of a lane, 0 <= expert < num_experts, rounded to the row's type.
template <typename Layout, typename scalar_t, typename Value>
__device__ void store_row(scalar_t* row, int num_experts, const Value& value) {
  using Packed = Vector<scalar_t, Layout::width>;
  const int count = Layout::wide ? (num_experts + kWarpSize - 1) / kWarpSize : Layout::per_lane;
#pragma unroll
  for (int i = 0; i < count; i += Layout::width) {
    const int first = Layout::expert(i, Layout::lane());
    if (first >= num_experts) continue;
    Packed packed;
#pragma unroll
    for (int k = 0; k < Layout::width; ++k) packed.values[k] = static_cast<scalar_t>(value(i + k));
    *reinterpret_cast<Packed*>(row + first) = packed;
  }
}

// Over the experts that take part: allowed, and not NaN (a NaN logit makes its own score NaN, no other).
template <typename Layout, typename Row>
__device__ SoftmaxRow<float> softmax_of(const Row& row) {
  float largest = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (row.allowed(i)) largest = fmaxf(largest, row.logit(i));  // fmaxf passes over NaN
  }
  largest = group_max<Layout::lanes>(largest);
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    const float logit = row.logit(i);
    if (row.allowed(i) && logit == logit) sum += expf(logit - largest);
  }
  return {largest, group_sum<Layout::lanes>(sum)};
}

// 4-vectors need rows of whole vectors and aligned pointers.
template <typename scalar_t>
bool rows_are_aligned(int64_t num_experts, std::initializer_list<const void*> pointers) {
  bool aligned = num_experts % kRowVector == 0;
  for (const void* p : pointers)
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % (kRowVector * sizeof(scalar_t)) == 0;
  return aligned;
}

// body(RowLayout{}) with the fewest registers that hold num_experts; a lane holds at most as many as its group has
// lanes. Without `every_layout` about half of them stand for all, for kernels that are seldom used.
template <bool every_layout = true, typename Body>
void dispatch_experts(int64_t num_experts, bool aligned, Body&& body) {
  check_fits_int32(num_experts, "num_experts");
  if (num_experts > kMaxRegisterExperts) return body(RowLayout<32, 0, 1>{});
  if (!aligned) {
    if constexpr (every_layout) {
      if (num_experts <= 16) return body(RowLayout<4, 4, 1>{});
    }
    if (num_experts <= 128) return body(RowLayout<32, 4, 1>{});
    return body(RowLayout<32, 32, 1>{});
  }
  if constexpr (every_layout) {
    if (num_experts <= 16) return body(RowLayout<4, 4, kRowVector>{});
    if (num_experts <= 32) return body(RowLayout<8, 4, kRowVector>{});
  }
  if (num_experts <= 64) return body(RowLayout<16, 4, kRowVector>{});
  if constexpr (every_layout) {
    if (num_experts <= 128) return body(RowLayout<16, 8, kRowVector>{});
  }
  if (num_experts <= 256) return body(RowLayout<32, 8, kRowVector>{});
  if constexpr (every_layout) {
    if (num_experts <= 512) return body(RowLayout<32, 16, kRowVector>{});
  }
  return body(RowLayout<32, 32, kRowVector>{});
}

template <typename Layout>
unsigned blocks_for_rows(int64_t rows) {
  const int64_t blocks = ceil_div(rows, Layout::rows_per_block);
  check_fits_int32(blocks, "num_tokens / rows per block");
  return static_cast<unsigned>(blocks);
}

}  // namespace moe_ext::cuda
