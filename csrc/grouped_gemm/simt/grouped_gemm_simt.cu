// Grouped GEMM without tensor cores, in fp32 arithmetic, for any shape and alignment.
// Mapping: a block of 256 threads computes a 128 x 64 tile of D, each thread 8 x 4 of it, over steps of 16 along the
//   contraction; the next step's operands are in registers while this step's are multiplied from shared memory.
//   Blocks loop over tiles: (row tile, column tile) of the forward product, found by tile_scheduler.h; (expert, row
//   tile, column tile) of the weight gradient.
// Traffic per tile: (128 + 64) * depth elements read, 128 * 64 written. Bound: fp32 FMA rate; memory for small groups.
#include "grouped_gemm_simt.h"

#include "../../common/cuda_launch.h"
#include "../problem_arrays.h"
#include "../tile_scheduler.h"

namespace moe_ext::simt {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 128, kTileColumns = 64, kTileDepth = 16;
constexpr int kThreadRows = 8, kThreadColumns = 4;
constexpr int kColumnThreads = kTileColumns / kThreadColumns;
constexpr int kPad = 4;  // keeps rows of shared memory 16-byte aligned and off each other's banks
constexpr int kLoadsA = kTileRows * kTileDepth / kThreads, kLoadsB = kTileColumns * kTileDepth / kThreads;

struct SharedTiles {
  float a[2][kTileDepth][kTileRows + kPad];
  float b[2][kTileDepth][kTileColumns + kPad];
};

// A matrix operand, `outer` x depth: which of the two runs along memory is a template argument of the loads.
template <typename T>
struct Operand {
  const T* data;
  int64_t leading;
};

template <typename T, bool depth_contiguous>
__device__ float load(const Operand<T>& operand, int64_t outer, int64_t depth, int64_t outer_end, int64_t depth_end) {
  if (outer >= outer_end || depth >= depth_end) return 0.f;
  return static_cast<float>(
      operand.data[depth_contiguous ? outer * operand.leading + depth : depth * operand.leading + outer]);
}

// Where load i of this thread falls inside a tile of kOuter x kTileDepth: neighbours along memory.
template <int kOuter, bool depth_contiguous>
__device__ void position(int i, int* outer, int* depth) {
  const int linear = i * kThreads + threadIdx.x;
  *outer = depth_contiguous ? linear / kTileDepth : linear % kOuter;
  *depth = depth_contiguous ? linear % kTileDepth : linear / kOuter;
}

// D tile [row.., column..] = A B^T, both operands outer x depth. All threads of the block must call.
template <typename T, typename Out, bool a_depth_contiguous, bool b_depth_contiguous>
__device__ void compute_tile(SharedTiles& tiles, Operand<T> a, Operand<T> b, Out* d, int64_t ldd, int64_t first_row,
                             int64_t rows, int64_t first_column, int64_t columns, int64_t depth) {
  const int thread_row = threadIdx.x / kColumnThreads * kThreadRows;
  const int thread_column = threadIdx.x % kColumnThreads * kThreadColumns;
  float sums[kThreadRows][kThreadColumns] = {};
  float next_a[kLoadsA], next_b[kLoadsB];

  const auto fetch = [&](int64_t first_depth) {
    int outer, inner;
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i) {
      position<kTileRows, a_depth_contiguous>(i, &outer, &inner);
      next_a[i] = load<T, a_depth_contiguous>(a, first_row + outer, first_depth + inner, rows, depth);
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i) {
      position<kTileColumns, b_depth_contiguous>(i, &outer, &inner);
      next_b[i] = load<T, b_depth_contiguous>(b, first_column + outer, first_depth + inner, columns, depth);
    }
  };
  const auto stage = [&](int buffer) {
    int outer, inner;
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i) {
      position<kTileRows, a_depth_contiguous>(i, &outer, &inner);
      tiles.a[buffer][inner][outer] = next_a[i];
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i) {
      position<kTileColumns, b_depth_contiguous>(i, &outer, &inner);
      tiles.b[buffer][inner][outer] = next_b[i];
    }
  };

  fetch(0);
  stage(0);
  __syncthreads();
  int buffer = 0;
  for (int64_t first_depth = 0; first_depth < depth; first_depth += kTileDepth) {
    const bool more = first_depth + kTileDepth < depth;
    if (more) fetch(first_depth + kTileDepth);
#pragma unroll
    for (int step = 0; step < kTileDepth; ++step) {
      float row_values[kThreadRows], column_values[kThreadColumns];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) row_values[r] = tiles.a[buffer][step][thread_row + r];
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) column_values[c] = tiles.b[buffer][step][thread_column + c];
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) sums[r][c] += row_values[r] * column_values[c];
      }
    }
    if (more) stage(buffer ^ 1);
    __syncthreads();
    buffer ^= 1;
  }

#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const int64_t row = first_row + thread_row + r;
    if (row >= rows) continue;
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t column = first_column + thread_column + c;
      if (column < columns) d[row * ldd + column] = static_cast<Out>(sums[r][c]);
    }
  }
}

template <typename T, bool weight_is_nk>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ input, const T* __restrict__ weight, T* __restrict__ output,
                   const int32_t* __restrict__ expert_offsets, int64_t num_experts, int64_t max_rows, int64_t n,
                   int64_t k) {
  __shared__ SharedTiles tiles;
  const int64_t column_tiles = ceil_div(n, kTileColumns);
  const int64_t total = row_tile_bound(max_rows, num_experts, kTileRows) * column_tiles;
  for (int64_t tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const RowTile found = find_row_tile(expert_offsets, num_experts, max_rows, kTileRows, tile / column_tiles);
    if (found.rows.begin == found.rows.end) continue;
    compute_tile<T, T, true, weight_is_nk>(tiles, {input, k}, {weight + found.expert * n * k, weight_is_nk ? k : n},
                                           output, n, found.rows.begin, found.rows.end,
                                           tile % column_tiles * kTileColumns, n, k);
  }
}

// grad_weight[e] [rows, columns] = a_e^T b_e, with a [M, rows] and b [M, columns].
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    wgrad_kernel(const T* __restrict__ a, const T* __restrict__ b, Out* __restrict__ grad_weight,
                 const int32_t* __restrict__ expert_offsets, const bool* __restrict__ trainable_experts,
                 int64_t num_experts, int64_t max_rows, int64_t rows, int64_t columns) {
  __shared__ SharedTiles tiles;
  const int64_t row_tiles = ceil_div(rows, kTileRows), column_tiles = ceil_div(columns, kTileColumns);
  for (int64_t tile = blockIdx.x; tile < num_experts * row_tiles * column_tiles; tile += gridDim.x) {
    const int64_t expert = tile / (row_tiles * column_tiles);
    const int64_t row_tile = tile / column_tiles % row_tiles;
    const RowRange range = rows_that_train(expert_offsets, trainable_experts, expert, max_rows);
    compute_tile<T, Out, false, false>(tiles, {a + range.begin * rows, rows}, {b + range.begin * columns, columns},
                                       grad_weight + expert * rows * columns, columns, row_tile * kTileRows, rows,
                                       tile % column_tiles * kTileColumns, columns, range.end - range.begin);
  }
}

// Enough blocks to fill the machine several times over; they loop over the rest.
constexpr int64_t kBlocksPerMultiprocessor = 16;

unsigned blocks_for(int64_t tiles, int multiprocessors) {
  return static_cast<unsigned>(std::min(tiles, kBlocksPerMultiprocessor * multiprocessors));
}

template <typename T>
void forward(const GroupedGemmArgs& args, int multiprocessors) {
  const int64_t tiles = row_tile_bound(args.max_rows, args.num_experts, kTileRows) * ceil_div(args.n, kTileColumns);
  const auto kernel = args.layout == WeightLayout::kENK ? forward_kernel<T, true> : forward_kernel<T, false>;
  launch_kernel(kernel, blocks_for(tiles, multiprocessors), kThreads, 0, args.stream, static_cast<const T*>(args.input),
                static_cast<const T*>(args.weight), static_cast<T*>(args.output), args.expert_offsets, args.num_experts,
                args.max_rows, args.n, args.k);
}

template <typename T, typename Out>
void wgrad(const GroupedWgradArgs& args, int multiprocessors) {
  const bool nk = args.layout == WeightLayout::kENK;
  const int64_t rows = nk ? args.n : args.k, columns = nk ? args.k : args.n;
  const int64_t tiles = args.num_experts * ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns);
  launch_kernel(wgrad_kernel<T, Out>, blocks_for(tiles, multiprocessors), kThreads, 0, args.stream,
                static_cast<const T*>(nk ? args.grad_output : args.input),
                static_cast<const T*>(nk ? args.input : args.grad_output), static_cast<Out*>(args.grad_weight),
                args.expert_offsets, args.trainable_experts, args.num_experts, args.max_rows, rows, columns);
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, int multiprocessors) {
  switch (args.dtype) {
    case GemmDtype::kFloat32: return forward<float>(args, multiprocessors);
    case GemmDtype::kBFloat16: return forward<BFloat16>(args, multiprocessors);
    case GemmDtype::kFloat16: return forward<Half>(args, multiprocessors);
  }
}

void grouped_gemm_wgrad(const GroupedWgradArgs& args, int multiprocessors) {
  switch (args.dtype) {
    case GemmDtype::kFloat32: return wgrad<float, float>(args, multiprocessors);
    case GemmDtype::kBFloat16:
      return args.float32_output ? wgrad<BFloat16, float>(args, multiprocessors)
                                 : wgrad<BFloat16, BFloat16>(args, multiprocessors);
    case GemmDtype::kFloat16:
      return args.float32_output ? wgrad<Half, float>(args, multiprocessors) : wgrad<Half, Half>(args, multiprocessors);
  }
}

}  // namespace moe_ext::simt
