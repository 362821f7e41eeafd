// One item of the small-rows kernel: what a thread copies, what it multiplies, and the sums that its warp leaves in
// shared memory. Device code; the mapping is told in grouped_gemm_small_rows.cu.
#pragma once

#include "../../experts/activation_vectors.h"
#include "../weight_layout.h"
#include "instructions.h"
#include "item_schedule.h"

namespace moe_ext::small_rows {

using cuda::DeviceActivation;
using cuda::RowMode;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWeightVectors = 8;                                  // per thread and step
constexpr int kRingVectors = 36;                                   // per thread: weights and input of all stages
constexpr int kRowTile = 8;                                        // rows of input in one mma.sync
constexpr int kRowTileSums = kTileColumns * kRowTile / kWarpSize;  // per thread

template <typename T>
constexpr int chunk_rows() {
  return std::is_same_v<T, float> ? kRowTile : 4 * kRowTile;
}

template <typename T>
struct Problem {
  const T* input;
  const T* weight;
  const T* bias;
  T* output;
  T* pre_activation;
  const int32_t* expert_offsets;
  const int32_t* permuted_to_slot;
  int64_t num_slots;
  int topk, num_experts;
  int64_t max_rows, n, k;
  int64_t column_tiles;
  RowMode mode;
  DeviceActivation activation;
};

// Columns of the product, of a tile: gate and up of one output always share a tile. Concatenated, its first half holds
// gate columns and its second half the up columns of the same outputs.
template <typename T>
__device__ int64_t column_of(const Problem<T>& problem, int64_t tile, int local) {
  if (problem.mode != RowMode::kConcatenated) return tile * kTileColumns + local;
  constexpr int kHalf = kTileColumns / 2;
  return (local < kHalf ? 0 : problem.n / 2) + tile * kHalf + local % kHalf;
}

template <typename T>
__device__ bool column_exists(const Problem<T>& problem, int64_t tile, int local) {
  if (problem.mode != RowMode::kConcatenated) return tile * kTileColumns + local < problem.n;
  constexpr int kHalf = kTileColumns / 2;
  return tile * kHalf + local % kHalf < problem.n / 2;
}

// What one thread copies: its 8 weight vectors and one input vector per row tile, step after step of its warp.
template <typename T, WeightLayout layout, int warps, int row_tiles>
struct Stream {
  static constexpr int kWidth = full_width<T>(), kThreads = warps * kWarpSize;
  static constexpr int kStepDepth = kGroupMembers * kWidth;
  static constexpr int kStageVectors = kWeightVectors + row_tiles, kStages = kRingVectors / kStageVectors;
  static constexpr bool kEnk = layout == WeightLayout::kENK;

  Word16* ring;            // this thread's vector 0; the next is kThreads further
  const char* weights[2];  // of vectors 0 and 4
  const char* rows[row_tiles];
  int64_t vector_stride, weight_advance;         // bytes
  int64_t depth, depth_end;                      // along k, of the next step
  unsigned weights_inside = 0, rows_inside = 0;  // bit per vector
  int stage = 0;

  __device__ Stream(const Problem<T>& problem, const Item& item, Word16* block_ring) : ring(block_ring + threadIdx.x) {
    const int lane = threadIdx.x % kWarpSize, group = lane / kGroupMembers, member = lane % kGroupMembers;
    const int64_t n = problem.n, k = problem.k;
    depth = static_cast<int64_t>(threadIdx.x / kWarpSize) * kStepDepth + member * kWidth;
    depth_end = k;
    const T* expert_weight = problem.weight + item.expert * n * k;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The column of the half's first vector; with 8 columns to a vector, the second half continues along k.
      constexpr bool kOneVectorWide = !kEnk && kWidth == kColumnsPerThread;
      const int local = tile_column(kEnk, kWidth, kOneVectorWide ? 0 : half * kColumnsPerThread / 2, group);
      const int64_t column = column_of(problem, item.column_tile, local);
      const int64_t row = depth + (kOneVectorWide ? half * kWeightVectors / 2 : 0);
      weights[half] = reinterpret_cast<const char*>(expert_weight + (kEnk ? column * k + depth : row * n + column));
#pragma unroll
      for (int v = 0; v < kWeightVectors / 2; ++v) {
        const int own = kEnk ? tile_column(true, kWidth, half * kWeightVectors / 2 + v, group) : local;
        if (column_exists(problem, item.column_tile, own)) weights_inside |= 1u << (half * kWeightVectors / 2 + v);
      }
    }
    vector_stride = (kEnk ? kGroupLanes * k : n) * static_cast<int64_t>(sizeof(T));
    weight_advance = warps * kStepDepth * (kEnk ? 1 : n) * static_cast<int64_t>(sizeof(T));
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      int64_t row = item.rows.begin + r * kRowTile + group;
      bool inside = row < item.rows.end;
      if (inside && problem.permuted_to_slot) {
        const int32_t slot = problem.permuted_to_slot[row];
        inside = slot >= 0 && slot < problem.num_slots;
        row = static_cast<uint32_t>(slot) / static_cast<uint32_t>(problem.topk);
      }
      if (inside) rows_inside |= 1u << r;
      rows[r] = reinterpret_cast<const char*>(problem.input + (inside ? row * k + depth : 0));
    }
  }

  // Asks for the next step.
  __device__ void fetch() {
    Word16* vectors = ring + stage * kStageVectors * kThreads;
    const bool inside = depth < depth_end;
#pragma unroll
    for (int v = 0; v < kWeightVectors; ++v) {
      const char* source = weights[v / 4] + v % 4 * vector_stride;
      copy_async(vectors + v * kThreads, source, inside && (weights_inside >> v & 1));
    }
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) {
      copy_async(vectors + (kWeightVectors + r) * kThreads, rows[r], inside && (rows_inside >> r & 1));
      rows[r] += warps * kStepDepth * sizeof(T);
    }
    weights[0] += weight_advance;
    weights[1] += weight_advance;
    depth += warps * kStepDepth;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
};

// Sums of one thread, as mma.sync leaves them: values[r][2 * q + b] is column q of the thread (item_schedule.h), row
// 2 * member + b of row tile r.
template <typename T, WeightLayout layout, int row_tiles>
struct Sums {
  float values[row_tiles][kRowTileSums] = {};

  // `vectors`: the thread's own of this stage, `stride` apart.
  __device__ void add(const Word16* vectors, int stride) {
    Word16 weights[kWeightVectors], rows[row_tiles];
#pragma unroll
    for (int v = 0; v < kWeightVectors; ++v) weights[v] = vectors[v * stride];
#pragma unroll
    for (int r = 0; r < row_tiles; ++r) rows[r] = vectors[(kWeightVectors + r) * stride];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        uint32_t a[4];
        if constexpr (layout == WeightLayout::kENK) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = weights[2 * tile + i % 2].values[2 * half + i / 2];
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int first = 4 * half + 2 * (i / 2);  // k of the register's two elements, columns 2 * tile + i % 2
            a[i] = __byte_perm(weights[first].values[tile], weights[first + 1].values[tile], i % 2 ? 0x7632 : 0x5410);
          }
        }
#pragma unroll
        for (int r = 0; r < row_tiles; ++r) {
          const uint32_t b[2] = {rows[r].values[2 * half], rows[r].values[2 * half + 1]};
          multiply_16x8x16<T>(values[r] + 4 * tile, a, b);
        }
      }
    }
  }

  __device__ void finish() {}
};

// fp32: every thread multiplies its vectors with all 8 rows; the members of a group then add up.
template <WeightLayout layout>
struct Sums<float, layout, 1> {
  float values[1][kRowTileSums];
  float partial[kColumnsPerThread][kRowTile] = {};

  __device__ void add(const Word16* vectors, int stride) {
    const int lane = threadIdx.x % kWarpSize, member = lane % kGroupMembers;
    float weights[kWeightVectors][4];
#pragma unroll
    for (int v = 0; v < kWeightVectors; ++v) {
      const Word16 vector = vectors[v * stride];
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[v][i] = __uint_as_float(vector.values[i]);
    }
    __syncwarp();  // the rows were copied by other lanes
#pragma unroll
    for (int row = 0; row < kRowTile; ++row) {
      const Word16 vector = vectors[kWeightVectors * stride - lane + row * kGroupMembers + member];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = __uint_as_float(vector.values[i]);
#pragma unroll
        for (int q = 0; q < kColumnsPerThread; ++q) {
          partial[q][row] += x * (layout == WeightLayout::kENK ? weights[q][i] : weights[q / 4 * 4 + i][q % 4]);
        }
      }
    }
    __syncwarp();  // before the next copy into this stage
  }

  // Member m keeps rows 2m and 2m + 1.
  __device__ void finish() {
    const int member = threadIdx.x % kGroupMembers;
#pragma unroll
    for (int q = 0; q < kColumnsPerThread; ++q) {
      float half[kRowTile / 2];
#pragma unroll
      for (int i = 0; i < kRowTile / 2; ++i) {
        const float low = partial[q][i], high = partial[q][i + kRowTile / 2];
        half[i] = (member & 2 ? high : low) + __shfl_xor_sync(kAllLanes, member & 2 ? low : high, 2);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = half[i], high = half[i + 2];
        values[0][2 * q + i] = (member & 1 ? high : low) + __shfl_xor_sync(kAllLanes, member & 1 ? low : high, 1);
      }
    }
  }
};

// Where a thread's value lies among the partial sums of its warp: turned by the value's number, so that neither the
// threads that write one value nor those that read a row of the tile meet in a bank.
__device__ inline int partial_index(int value, int lane) {
  return value * kWarpSize + (lane + value / 2 % 8) % kWarpSize;
}

// Leaves the sums of each warp in `shared`, row_tiles * kRowTileSums * kWarpSize floats per warp.
template <typename T, WeightLayout layout, int warps, int row_tiles>
__device__ void multiply(const Problem<T>& problem, const Item& item, Word16* shared) {
  using Copies = Stream<T, layout, warps, row_tiles>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int steps = steps_of_warp(static_cast<int>(ceil_div(problem.k, Copies::kStepDepth)), warp, warps);
  Sums<T, layout, row_tiles> sums;
  {
    Copies copies(problem, item, shared);
    for (int i = 0; i < Copies::kStages - 1; ++i) {
      if (i < steps) copies.fetch();
      commit_copies();
    }
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<Copies::kStages - 2>();
      if (step + Copies::kStages - 1 < steps) copies.fetch();  // into the stage that was multiplied last
      commit_copies();
      sums.add(copies.ring + stage * Copies::kStageVectors * Copies::kThreads, Copies::kThreads);
      stage = stage + 1 == Copies::kStages ? 0 : stage + 1;
    }
    wait_for_copies<0>();
  }
  sums.finish();
  __syncthreads();  // all warps are done with the ring
  auto* partial = reinterpret_cast<float*>(shared) + warp * row_tiles * kRowTileSums * kWarpSize;
#pragma unroll
  for (int r = 0; r < row_tiles; ++r) {
#pragma unroll
    for (int i = 0; i < kRowTileSums; ++i) partial[partial_index(r * kRowTileSums + i, lane)] = sums.values[r][i];
  }
  __syncthreads();
}

}  // namespace moe_ext::small_rows
