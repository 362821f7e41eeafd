// One row of experts spread over a warp: lane l holds experts l, l + 32, l + 64, ...
// Up to kMaxRegisterExperts the row lies in registers (per_lane of them); above, per_lane is 0 and the row is read from
// memory, in practice from the caches, at every use.
#pragma once

#include <cfloat>
#include <type_traits>

#include "../common/block_select.h"
#include "scores.h"

namespace moe_ext::cuda {

constexpr int kGateWarps = 4;  // warps, and so rows, per block
constexpr int kGateThreads = kGateWarps * kWarpSize;
constexpr int64_t kMaxRegisterExperts = 1024;
// Bounds the workspace of kernels that keep one row per warp in memory.
constexpr int64_t kMaxWideBlocks = 512;

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

__device__ inline uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// `allowed` is false past the last expert, so that loops over count() need no other bound.
template <typename scalar_t, int per_lane>
struct WarpRow {
  float logits[per_lane];
  bool mask[per_lane];

  __device__ WarpRow(const scalar_t* row, const bool* expert_mask, int num_experts, int lane) {
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int expert = lane + i * kWarpSize;
      mask[i] = expert < num_experts && (!expert_mask || expert_mask[expert]);
      logits[i] = expert < num_experts ? static_cast<float>(row[expert]) : 0.f;
    }
  }
  __device__ static constexpr int count() { return per_lane; }
  __device__ float logit(int i) const { return logits[i]; }
  __device__ bool allowed(int i) const { return mask[i]; }
};

template <typename scalar_t>
struct WarpRow<scalar_t, 0> {
  const scalar_t* row;
  const bool* expert_mask;
  int num_experts, lane;

  __device__ WarpRow(const scalar_t* row, const bool* expert_mask, int num_experts, int lane)
      : row(row), expert_mask(expert_mask), num_experts(num_experts), lane(lane) {}
  __device__ int count() const { return (num_experts + kWarpSize - 1) / kWarpSize; }
  __device__ float logit(int i) const {
    const int expert = lane + i * kWarpSize;
    return expert < num_experts ? static_cast<float>(row[expert]) : 0.f;
  }
  __device__ bool allowed(int i) const {
    const int expert = lane + i * kWarpSize;
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

// Over the experts that take part: allowed, and not NaN (a NaN logit makes its own score NaN, no other).
template <typename Row>
__device__ SoftmaxRow<float> softmax_of(const Row& row) {
  float largest = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (row.allowed(i) && row.logit(i) > largest) largest = row.logit(i);
  }
  largest = warp_max(largest);
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    const float logit = row.logit(i);
    if (row.allowed(i) && logit == logit) sum += expf(logit - largest);
  }
  return {largest, warp_sum(sum)};
}

// body(std::integral_constant<int, per_lane>) with the fewest registers that hold num_experts, 0 if none do.
template <typename Body>
void dispatch_experts(int64_t num_experts, Body&& body) {
  check_fits_int32(num_experts, "num_experts");
  if (num_experts <= 32) return body(std::integral_constant<int, 1>{});
  if (num_experts <= 64) return body(std::integral_constant<int, 2>{});
  if (num_experts <= 128) return body(std::integral_constant<int, 4>{});
  if (num_experts <= 256) return body(std::integral_constant<int, 8>{});
  if (num_experts <= 512) return body(std::integral_constant<int, 16>{});
  if (num_experts <= kMaxRegisterExperts) return body(std::integral_constant<int, kMaxRegisterExperts / kWarpSize>{});
  return body(std::integral_constant<int, 0>{});
}

inline unsigned blocks_for_rows(int64_t rows, int64_t most = kMaxBlocks) {
  return static_cast<unsigned>(std::min(ceil_div(rows, kGateWarps), most));
}

}  // namespace moe_ext::cuda
