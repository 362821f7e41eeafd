// Block-wide scan and radix select for kernels of kSelectThreads threads; integers only, all threads must call.
// CachedKeys: what a select and the passes after it read.
#pragma once

#include "cuda_launch.h"
#include "ordered_key.h"

namespace moe_ext {

constexpr int kSelectThreads = 512;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int64_t kCachedKeys = 8 * 1024;  // 32 KiB

// Dynamic shared memory of a kernel that has CachedKeys of at most `most` items.
inline size_t cached_key_bytes(int64_t most) { return std::min(most, kCachedKeys) * sizeof(uint32_t); }

// Exclusive scan of one value per thread over the block; `total` receives the sum.
__device__ inline int block_exclusive_scan(int value, int* total) {
  constexpr int kWarps = kSelectThreads / kWarpSize;
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  __syncthreads();  // warp_sums may still be read from the last call
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0, sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    sum += warp_sums[w];
  }
  *total = sum;
  return before + inclusive - value;
}

// The keys of items 0 .. count - 1, each worked out once and kept in shared memory, or every time where there are more
// than kCachedKeys. Thread t may ask for items t + n * kSelectThreads only, the ones it kept: no barrier.
template <typename Key>
class CachedKeys {
 public:
  __device__ CachedKeys(const Key& key, int64_t count, uint32_t* cache)
      : key_(key), cache_(cache), cached_(count <= kCachedKeys) {
    constexpr int kInFlight = 4;
    const int items = cached_ ? static_cast<int>(count) : 0;
    for (int first = threadIdx.x; first < items; first += kInFlight * kSelectThreads) {
      uint32_t keys[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        keys[i] = first + i * kSelectThreads < items ? key(first + i * kSelectThreads) : 0;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (first + i * kSelectThreads < items) cache[first + i * kSelectThreads] = keys[i];
      }
    }
  }
  __device__ uint32_t operator()(int64_t item) const { return cached_ ? cache_[item] : key_(item); }

 private:
  const Key& key_;
  uint32_t* cache_;
  bool cached_;
};

// The `wanted`-th largest of key(0) .. key(count - 1), 1 <= wanted <= count, in 4 passes over 8 bits each; `ties`
// receives how many items with that very key belong to the largest `wanted`.
template <typename Key>
__device__ uint32_t select_threshold(const Key& key, int64_t count, int wanted, int* ties) {
  constexpr int kDigits = 256;
  __shared__ int histogram[kDigits];
  __shared__ uint32_t chosen;
  __shared__ int left;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kSelectThreads) histogram[digit] = 0;
    __syncthreads();
    const uint32_t mask = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) {
      const uint32_t value = key(i);
      if ((value & mask) == prefix) atomicAdd(&histogram[(value >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    // The digit at which the counts from the top reach `wanted`: one warp, a lane takes kDigits / 32 digits downwards.
    if (threadIdx.x < kWarpSize) {
      constexpr int kPerLane = kDigits / kWarpSize;
      const int lane = threadIdx.x, top = kDigits - 1 - lane * kPerLane;
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) sum += histogram[top - i];
      int through = sum;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int above = __shfl_up_sync(kFullMask, through, offset);
        if (lane >= offset) through += above;
      }
      if (through >= wanted && through - sum < wanted) {
        int digit = top, missing = wanted - (through - sum);
        while (histogram[digit] < missing) missing -= histogram[digit--];
        chosen = prefix | static_cast<uint32_t>(digit) << shift;
        left = missing;
      }
    }
    __syncthreads();
    prefix = chosen;
    wanted = left;
  }
  *ties = wanted;
  return prefix;
}

}  // namespace moe_ext
