// One row of logits in the registers of a warp: lane l holds experts l, l + 32, l + 64, ...
#pragma once

#include <cfloat>

#include "../common/block_select.h"
#include "scores.h"

namespace moe_ext::cuda {

constexpr int kGateWarps = 4;  // warps, and so rows, per block
constexpr int kGateThreads = kGateWarps * kWarpSize;
constexpr int64_t kMaxExpertsCuda = 1024;

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

template <int per_lane>
struct WarpRow {
  float logits[per_lane];
  bool allowed[per_lane];

  template <typename scalar_t>
  __device__ void load(const scalar_t* row, const bool* mask, int num_experts, int lane) {
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int expert = lane + i * kWarpSize;
      allowed[i] = expert < num_experts && (!mask || mask[expert]);
      logits[i] = expert < num_experts ? static_cast<float>(row[expert]) : 0.f;
    }
  }

  // Over the experts that take part: allowed, and not NaN (a NaN logit makes its own score NaN, no other).
  __device__ SoftmaxRow<float> softmax() const {
    float largest = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (allowed[i] && logits[i] > largest) largest = logits[i];
    }
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (allowed[i] && logits[i] == logits[i]) sum += expf(logits[i] - largest);
    }
    return {largest, warp_sum(sum)};
  }
};

// body(std::integral_constant<int, per_lane>) with the fewest registers that hold num_experts.
template <typename Body>
void dispatch_experts(int64_t num_experts, Body&& body) {
  MOE_CHECK(num_experts <= kMaxExpertsCuda, "logits: expected at most ", kMaxExpertsCuda, " experts on CUDA, got ",
            num_experts);
  if (num_experts <= 32) return body(std::integral_constant<int, 1>{});
  if (num_experts <= 64) return body(std::integral_constant<int, 2>{});
  if (num_experts <= 128) return body(std::integral_constant<int, 4>{});
  if (num_experts <= 256) return body(std::integral_constant<int, 8>{});
  if (num_experts <= 512) return body(std::integral_constant<int, 16>{});
  return body(std::integral_constant<int, kMaxExpertsCuda / kWarpSize>{});
}

inline unsigned blocks_for_rows(int64_t rows) {
  return static_cast<unsigned>(std::min(ceil_div(rows, kGateWarps), kMaxBlocks));
}

}  // namespace moe_ext::cuda
