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

#include <map>
#include <mutex>
#include <tuple>

#include "../tile_choice.h"
#include "item_product.h"

namespace moe_ext::small_rows {
namespace {

using cuda::GateUpVector;

constexpr int kFewItemsWarps = 8, kManyItemsWarps = 4;
constexpr int kManyItemsBlocks = 3;  // per multiprocessor, at 72 kB of shared memory each and one per expert

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
    cuda::evaluate<mode, T>(problem.activation, x, value, derivative);
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
  int device, multiprocessors;
  size_t block_shared_bytes;  // the most that a block can have: 227 kB on sm_90, 163 kB on sm_80, 99 kB on sm_86
};

Machine read_machine(int device) {
#ifdef MOE_EXT_EMULATED
  return {device, 3, moe_emulator::kMaxSharedBytes};
#else
  int multiprocessors = 0, bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {device, multiprocessors, static_cast<size_t>(bytes)};
#endif
}

size_t shared_bytes_of(int warps, int64_t num_experts) {
  return kRingVectors * warps * kWarpSize * sizeof(Word16) + (num_experts + 1) * sizeof(int32_t);
}

// What a launch must know of the runtime.
struct Residency {
  int blocks;     // that a multiprocessor holds
  bool overlaps;  // the kernel waits for the one before it; code for sm_80 does not, whatever it runs on
};

// Asked once: together the questions take as long as the kernel. `most_bytes` is what the kernel may ever take on the
// device, since threads that launch it with different sizes share one limit.
template <typename Parameter>
Residency residency_of(void (*kernel)(Parameter), int device, int threads, size_t shared_bytes, size_t most_bytes) {
#ifdef MOE_EXT_EMULATED
  allow_shared_bytes(kernel, most_bytes);
  return {kManyItemsBlocks, false};
#else
  static std::mutex mutex;
  static auto& known = *new std::map<std::tuple<const void*, int, size_t>, Residency>;  // outlives every thread
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [place, unknown] = known.try_emplace({reinterpret_cast<const void*>(kernel), device, shared_bytes});
  if (unknown) {
    try {
      allow_shared_bytes(kernel, most_bytes);
      check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&place->second.blocks, kernel, threads, shared_bytes));
      cudaFuncAttributes attributes;
      check_cuda(cudaFuncGetAttributes(&attributes, kernel));
      place->second.overlaps = attributes.ptxVersion >= 90;
    } catch (...) {
      known.erase(place);
      throw;
    }
  }
  return place->second;
#endif
}

template <typename T, WeightLayout layout, int warps>
void launch(const Problem<T>& problem, int64_t items, const Machine& machine, cudaStream_t stream) {
  constexpr int kThreads = warps * kWarpSize;
  const auto kernel = small_rows_kernel<T, layout, warps>;
  const size_t shared_bytes = shared_bytes_of(warps, problem.num_experts);
  const size_t most_bytes = std::min(shared_bytes_of(warps, kMaxExperts), machine.block_shared_bytes);
  const Residency residency = residency_of(kernel, machine.device, kThreads, shared_bytes, most_bytes);
  // In as few rounds as there can be, and these equally full: a last round of few blocks cannot fill the memory's pipe.
  const int64_t rounds = ceil_div(items, int64_t{machine.multiprocessors} * std::max(residency.blocks, 1));
  const auto blocks = static_cast<unsigned>(ceil_div(items, rounds));
  // In decoding, where kernels take microseconds, the two products of a layer then follow each other without a gap.
  if (residency.overlaps) {
    launch_overlapped(kernel, blocks, kThreads, shared_bytes, stream, problem);
  } else {
    launch_kernel(kernel, blocks, kThreads, shared_bytes, stream, problem);
  }
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
              args.max_rows <= kMaxAverageRows * args.num_experts && forced_sm90_tile() < 0;
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
