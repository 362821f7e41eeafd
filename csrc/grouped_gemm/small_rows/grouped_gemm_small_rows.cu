// Grouped GEMM for few rows per expert: decoding.
// Mapping: an item is (expert, chunk of up to 32 rows, in fp32 8, 64 columns); blocks loop over items as
//   item_schedule.h says. The warps of a block take steps of 64 bytes along k in turn, each with its own sums for all
//   64 columns, which meet in shared memory in warp order: deterministic. The weights are the 16-row operand of
//   mma.sync, 8 input rows the columns. No operand is shared between threads: which k a fragment register holds is free
//   as long as both operands agree, so member m of a lane group takes the m-th 16-byte vector of the step, and a thread
//   copies (cp.async) exactly what it will multiply. A ring of such copies per thread needs no barrier. fp32 multiplies
//   by FMA.
//     enk: a weight vector is 8 values of k of one column, a fragment register is 32 bits of it.
//     ekn: it is 8 columns at one k; pairs of vectors are interleaved, 4 byte permutes each.
// Traffic: weights of used experts once per chunk of rows (from L2 after the first), input rows once per column tile
//   (from L2), output once.
// Bound: device memory. An H100 needs 3.35 TB/s * 700 ns / 132 = 18 kB under way per multiprocessor. A stage of a block
//   of 4 warps is 16 kB of weights; of 4 stages (3 for chunks of more than 8 rows) one is being multiplied, and 3
//   blocks share a multiprocessor: 144 kB under way (96 kB), so that blocks may wait or finish an item now and then.
//   Where there are fewer items than multiprocessors, one block of 8 warps: 96 kB (64 kB).
#include "grouped_gemm_small_rows.h"

#include "../../experts/activation_vectors.h"
#include "instructions.h"
#include "item_schedule.h"

namespace moe_ext::small_rows {
namespace {

using cuda::DeviceActivation;
using cuda::GateUpVector;
using cuda::RowMode;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWeightVectors = 8;                                  // per thread and step
constexpr int kRingVectors = 36;                                   // per thread: weights and input of all stages
constexpr int kRowTile = 8;                                        // rows of input in one mma.sync
constexpr int kRowTileSums = kTileColumns * kRowTile / kWarpSize;  // per thread
constexpr int kFewItemsWarps = 8, kManyItemsWarps = 4;
constexpr int kManyItemsBlocks = 3;  // per multiprocessor, at 72 kB of shared memory each and one per expert

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

// Adds up the warps' sums; bias, activation, stores. Consecutive threads take consecutive columns of one row.
template <RowMode mode, typename T, WeightLayout layout, int warps>
__device__ void finish(const Problem<T>& problem, const Item& item, int row_tiles, const float* partial) {
  constexpr int kOutputs = mode == RowMode::kPlain ? kTileColumns : kTileColumns / 2;
  const int64_t out_width = mode == RowMode::kPlain ? problem.n : problem.n / 2;
  const int rows = static_cast<int>(item.rows.end - item.rows.begin);
  const auto total = [&](int row, int local) {
    const auto [q, group] = holder_of_column(layout == WeightLayout::kENK, full_width<T>(), local);
    const int value = row / kRowTile * kRowTileSums + 2 * q + row % 2;
    const int index = partial_index(value, group * kGroupMembers + row % kRowTile / 2);
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < warps; ++w) sum += partial[w * row_tiles * kRowTileSums * kWarpSize + index];
    const int64_t column = column_of(problem, item.column_tile, local);
    if (problem.bias) sum += static_cast<float>(problem.bias[item.expert * problem.n + column]);
    if (problem.pre_activation) {
      problem.pre_activation[(item.rows.begin + row) * problem.n + column] = static_cast<T>(sum);
    }
    return sum;
  };
  for (int i = threadIdx.x; i < rows * kOutputs; i += warps * kWarpSize) {
    const int row = i / kOutputs, local = i % kOutputs;
    const int64_t column = item.column_tile * kOutputs + local;
    if (column >= out_width) continue;
    GateUpVector<1> x;
    x.gate[0] = total(row, mode == RowMode::kInterleaved ? 2 * local : local);
    if constexpr (mode == RowMode::kInterleaved) x.up[0] = total(row, 2 * local + 1);
    if constexpr (mode == RowMode::kConcatenated) x.up[0] = total(row, local + kOutputs);
    float value[1];
    GateUpVector<1> derivative;
    cuda::evaluate<mode>(problem.activation, x, value, derivative);
    problem.output[(item.rows.begin + row) * out_width + column] = static_cast<T>(value[0]);
  }
}

// chunk_starts [num_experts + 1] = exclusive prefix sums of the experts' row chunks.
template <int warps>
__device__ void count_chunks(const int32_t* expert_offsets, int num_experts, int64_t max_rows, int64_t chunk,
                             int32_t* chunk_starts) {
  __shared__ int warp_totals[warps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int per_thread = (num_experts + warps * kWarpSize - 1) / (warps * kWarpSize);
  const int first = static_cast<int>(threadIdx.x) * per_thread;
  const int last = min(first + per_thread, num_experts);
  int own = 0;
  for (int e = first; e < last; ++e) {
    own += static_cast<int>(row_chunks(rows_of_expert(expert_offsets, e, max_rows), chunk));
  }
  int inclusive = own;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAllLanes, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == kWarpSize - 1) warp_totals[warp] = inclusive;
  __syncthreads();
  int start = inclusive - own;
#pragma unroll
  for (int w = 0; w < warps; ++w) start += w < warp ? warp_totals[w] : 0;
  for (int e = first; e < last; ++e) {
    chunk_starts[e] = start;
    start += static_cast<int>(row_chunks(rows_of_expert(expert_offsets, e, max_rows), chunk));
    if (e + 1 == num_experts) chunk_starts[num_experts] = start;
  }
  __syncthreads();
}

// Zeroes the rows before the first expert and past the last, split over the blocks.
template <typename Word>
__device__ void zero_rows_of_no_expert(void* rows, int64_t row_bytes, const int32_t* expert_offsets,
                                       int64_t num_experts, int64_t max_rows) {
  const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t head = rows_of_expert(expert_offsets, 0, max_rows).begin * row_words;
  const int64_t end = max(rows_of_expert(expert_offsets, num_experts - 1, max_rows).end * row_words, head);
  const int64_t count = head + max_rows * row_words - end;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    static_cast<Word*>(rows)[i < head ? i : end + i - head] = Word{};
  }
}

template <typename T>
__device__ void zero_rows_of_no_expert(const Problem<T>& problem, T* rows, int64_t width) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  if (row_bytes % sizeof(Word16) == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Word16) == 0) {
    zero_rows_of_no_expert<Word16>(rows, row_bytes, problem.expert_offsets, problem.num_experts, problem.max_rows);
  } else {
    zero_rows_of_no_expert<uint16_t>(rows, row_bytes, problem.expert_offsets, problem.num_experts, problem.max_rows);
  }
}

template <typename T, WeightLayout layout, int warps>
__global__ void __launch_bounds__(warps* kWarpSize, warps == kManyItemsWarps ? kManyItemsBlocks : 1)
    small_rows_kernel(const Problem<T> problem) {
  MOE_DYNAMIC_SHARED(Word16, shared);
  constexpr int kChunk = chunk_rows<T>();
  auto* chunk_starts = reinterpret_cast<int32_t*>(shared + kRingVectors * warps * kWarpSize);
  const auto* partial = reinterpret_cast<const float*>(shared);
  wait_for_previous_kernel();
  let_next_kernel_start();
  count_chunks<warps>(problem.expert_offsets, problem.num_experts, problem.max_rows, kChunk, chunk_starts);
  const int64_t items = chunk_starts[problem.num_experts] * problem.column_tiles;
  for (int64_t i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item = find_item(chunk_starts, problem.expert_offsets, problem.num_experts, problem.max_rows, kChunk,
                                problem.column_tiles, i);
    const int64_t rows = item.rows.end - item.rows.begin;
    int row_tiles = 1;
    if constexpr (kChunk == kRowTile) {
      multiply<T, layout, warps, 1>(problem, item, shared);
    } else if (rows <= kRowTile) {
      multiply<T, layout, warps, 1>(problem, item, shared);
    } else if (rows <= 2 * kRowTile) {
      row_tiles = 2;
      multiply<T, layout, warps, 2>(problem, item, shared);
    } else {
      row_tiles = 4;
      multiply<T, layout, warps, 4>(problem, item, shared);
    }
    switch (problem.mode) {
      case RowMode::kPlain: finish<RowMode::kPlain, T, layout, warps>(problem, item, row_tiles, partial); break;
      case RowMode::kConcatenated:
        finish<RowMode::kConcatenated, T, layout, warps>(problem, item, row_tiles, partial);
        break;
      case RowMode::kInterleaved:
        finish<RowMode::kInterleaved, T, layout, warps>(problem, item, row_tiles, partial);
        break;
    }
    __syncthreads();  // before the next item's copies
  }
  zero_rows_of_no_expert(problem, problem.output, problem.mode == RowMode::kPlain ? problem.n : problem.n / 2);
  if (problem.pre_activation) zero_rows_of_no_expert(problem, problem.pre_activation, problem.n);
}

struct Machine {
  int multiprocessors;
  size_t block_shared_bytes;  // the most that a block can have: 227 kB on sm_90, 163 kB on sm_80, 99 kB on sm_86
};

Machine read_machine(int device) {
#ifdef MOE_EXT_EMULATED
  return {3, moe_emulator::kMaxSharedBytes};
#else
  int multiprocessors = 0, bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {multiprocessors, static_cast<size_t>(bytes)};
#endif
}

// Lets the kernel take `shared_bytes`; returns how many of its blocks a multiprocessor holds.
template <typename Kernel>
int resident_blocks(Kernel kernel, int threads, size_t shared_bytes) {
#ifdef MOE_EXT_EMULATED
  return kManyItemsBlocks;
#else
  int blocks = 0;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return blocks;
#endif
}

// As launch_kernel. On sm_90 the kernel may be placed while the one before it ends: in decoding, where kernels take
// microseconds, the two products of a layer follow each other without a gap.
template <typename Parameter>
void launch_overlapped(void (*kernel)(Parameter), unsigned blocks, int threads, size_t shared_bytes,
                       cudaStream_t stream, const Parameter& parameter) {
#ifndef MOE_EXT_EMULATED
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  if (attributes.ptxVersion >= 90) {  // code for sm_80 does not wait, whatever it runs on
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, parameter));
    return;
  }
#endif
  launch_kernel(kernel, blocks, threads, shared_bytes, stream, parameter);
}

size_t shared_bytes_of(int warps, int num_experts) {
  return kRingVectors * warps * kWarpSize * sizeof(Word16) + (num_experts + 1) * sizeof(int32_t);
}

template <typename T, WeightLayout layout, int warps>
void launch(const Problem<T>& problem, int64_t items, const Machine& machine, cudaStream_t stream) {
  constexpr int kThreads = warps * kWarpSize;
  const auto kernel = small_rows_kernel<T, layout, warps>;
  const size_t shared_bytes = shared_bytes_of(warps, problem.num_experts);
  const int64_t resident = int64_t{machine.multiprocessors} * resident_blocks(kernel, kThreads, shared_bytes);
  launch_overlapped(kernel, static_cast<unsigned>(std::min(items, resident)), kThreads, shared_bytes, stream, problem);
}

template <typename T, WeightLayout layout>
void run(const Arguments& args, const Machine& machine, cudaStream_t stream) {
  const RowMode mode = cuda::row_mode(args.activation);
  const int64_t column_tiles =
      mode == RowMode::kConcatenated ? ceil_div(args.n / 2, kTileColumns / 2) : ceil_div(args.n, kTileColumns);
  const Problem<T> problem = {static_cast<const T*>(args.input),
                              static_cast<const T*>(args.weight),
                              static_cast<const T*>(args.bias),
                              static_cast<T*>(args.output),
                              static_cast<T*>(args.pre_activation),
                              args.expert_offsets,
                              args.permuted_to_slot,
                              args.num_slots,
                              static_cast<int>(args.topk),
                              static_cast<int>(args.num_experts),
                              args.max_rows,
                              args.n,
                              args.k,
                              column_tiles,
                              mode,
                              cuda::on_device(args.activation)};
  const int64_t items = item_bound(args.max_rows, args.num_experts, chunk_rows<T>(), column_tiles);
  const bool few = items <= machine.multiprocessors &&
                   shared_bytes_of(kFewItemsWarps, problem.num_experts) <= machine.block_shared_bytes;
  if (few) {
    launch<T, layout, kFewItemsWarps>(problem, items, machine, stream);
  } else {
    launch<T, layout, kManyItemsWarps>(problem, items, machine, stream);
  }
}

template <typename T>
void run(const Arguments& args, const Machine& machine, cudaStream_t stream) {
  if (args.layout == WeightLayout::kENK) {
    run<T, WeightLayout::kENK>(args, machine, stream);
  } else {
    run<T, WeightLayout::kEKN>(args, machine, stream);
  }
}

}  // namespace

bool takes(const Arguments& args) {
  const int64_t width = kVectorBytes / (args.dtype == GemmDtype::kFloat32 ? 4 : 2);
  bool fits = args.max_rows > 0 && args.n > 0 && args.k > 0 && args.num_experts <= kMaxExperts &&
              args.max_rows <= kMaxAverageRows * args.num_experts;
  constexpr int64_t kMaxExtent = int64_t{1} << 24;  // few enough that items of an expert are counted in 32 bits
  fits = fits && args.n <= kMaxExtent && args.k <= kMaxExtent && args.topk <= kMaxExtent;
  fits = fits && args.k % width == 0;
  if (args.layout == WeightLayout::kEKN) {
    const bool halves = args.activation.gated() && !args.activation.interleaved;
    fits = fits && (halves ? args.n % (2 * width) : args.n % width) == 0;
  }
  for (const void* pointer : {args.input, args.weight}) {
    fits = fits && reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
  }
  return fits;
}

void grouped_gemm(const Arguments& args, int device, cudaStream_t stream) {
  const Machine machine = read_machine(device);
  switch (args.dtype) {
    case GemmDtype::kFloat32: return run<float>(args, machine, stream);
    case GemmDtype::kBFloat16: return run<BFloat16>(args, machine, stream);
    case GemmDtype::kFloat16: return run<Half>(args, machine, stream);
  }
}

}  // namespace moe_ext::small_rows
