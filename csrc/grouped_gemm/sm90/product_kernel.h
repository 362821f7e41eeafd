// The sm_90a grouped product: persistent, warp-specialised, TMA in and out, wgmma in between.
//
// D = A B^T tile by tile, A [rows, depth], B [columns, depth], fp32 accumulation:
//   forward  A = input [M, K], its rows cut by expert_offsets; B = weight[e], K-major (ENK) or MN-major (EKN); the
//            gradient to the input is the same product under the other layout
//   wgrad    per expert D [rows, columns] = a_e^T b_e, the depth being the expert's rows of a [M, rows], b [M, columns]
// One tensor map per operand and launch: the expert is a coordinate (of weights and their gradients) or a row number,
// so no map changes from group to group. A load that passes the end of a group reads the next expert's rows: of the
// forward product these give rows that are not stored; wgrad zeroes them in shared memory.
// Mapping: a block per multiprocessor takes tiles number blockIdx, blockIdx + gridDim, ... (grouped_row_tiles.h). The
//   first of its three warpgroups fills a ring of stages of depth 64, the other two multiply: each 64 rows of the tile,
//   or half of the columns of a 64-row tile. The accumulators leave through shared memory, 64 rows of 128 bytes at a
//   time: by TMA store where all 64 rows belong to the group, else by predicated 16-byte stores. The ring runs ahead
//   into the next tile meanwhile. product_finish.h fuses bias, activation and the activation's gradient;
//   product_gather.h reads an operand's rows where they lie.
// Clusters: two blocks take tiles of neighbouring rows, each loads half of their B into both. A stage is then free when
//   the math warps of both blocks are done with it. Where a group has an odd number of tiles a block multiplies rows
//   that it does not store.
// Traffic per tile and step of 64: (rows + columns / cluster) * 128 bytes read, mostly from L2. Bound: tensor cores for
//   large groups, weight reads for small ones.
#pragma once

#include "../../common/cuda_launch.h"
#include "grouped_row_tiles.h"
#include "hopper.h"
#include "product_arguments.h"

namespace moe_ext::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kMathWarpgroups = 2;
constexpr int kMathThreads = kMathWarpgroups * kWarpgroup;
constexpr int kProductThreads = kMathThreads + kWarpgroup;
// Of each thread, once roles are known; together no more than the block was launched with.
constexpr int kLaunchRegisters = 64 * 1024 / kProductThreads / 8 * 8;
constexpr int kProducerRegisters = 56, kMathRegisters = 224;
static_assert(kWarpgroup * kProducerRegisters + kMathThreads * kMathRegisters <= kProductThreads * kLaunchRegisters);
// Named barriers; 0 is __syncthreads.
constexpr int kMathBarrier = 1, kFirstWarpgroupBarrier = 2;

// Of a warpgroup that moves rows in shared memory, thread t takes chunk t % 8 of rows t / 8, t / 8 + kRowsAtOnce, ...
constexpr int kRowsAtOnce = kWarpgroup / kRowChunks;
static_assert(kRowsAtOnce % 8 == 0, "so a thread's rows are all swizzled alike");

constexpr int kPieceRows = 64;  // what is stored at once: 64 rows of 128 bytes
constexpr int kPieceBytes = kPieceRows * kRowBytes;

template <typename Element_, typename Output_, Contraction contraction, Major b_major, int rows, int columns,
          int stages, int cluster = 1, Finish finish = Finish::kStore, cuda::RowMode mode = cuda::RowMode::kPlain>
struct ProductConfig {
  using Element = Element_;
  using Output = Output_;
  static constexpr Contraction kContraction = contraction;
  static constexpr bool kWgrad = contraction == Contraction::kExpertRows;
  static constexpr Major kMajorA = kWgrad ? Major::kMN : Major::kK;
  static constexpr Major kMajorB = b_major;
  static_assert(!kWgrad || b_major == Major::kMN);
  static constexpr int kRows = rows, kColumns = columns, kStages = stages, kCluster = cluster;
  static constexpr int kClusterRows = rows * cluster;  // that a cluster takes at a time
  static constexpr Finish kFinish = finish;
  static constexpr cuda::RowMode kMode = mode;
  static_assert(finish == Finish::kStore || !kWgrad);

  // What one math warpgroup computes.
  static constexpr bool kSplitsColumns = rows == 64;
  static constexpr int kWarpgroupColumns = kSplitsColumns ? columns / 2 : columns;
  static_assert(rows == 64 || rows == 64 * kMathWarpgroups);

  // Gate and up columns that belong together come into one warpgroup's accumulators: the first half of its columns are
  // gates, the second ups. Columns are then counted in such pairs.
  static constexpr bool kPairsColumns = finish == Finish::kActivate && mode == cuda::RowMode::kConcatenated;
  static constexpr int kTileColumns = kPairsColumns ? columns / 2 : columns;

  // TMA boxes are 64 deep; an MN-major operand comes in boxes of 64 rows of the matrix.
  static constexpr int kBoxA = kMajorA == Major::kMN ? 64 : rows;
  static constexpr int kBoxB = kMajorB == Major::kMN ? 64 : kPairsColumns ? kWarpgroupColumns / 2 : columns / cluster;
  static constexpr int kBoxesB = columns / kBoxB / cluster;  // that one block loads
  static_assert(kBoxesB * kBoxB * cluster == columns);

  static constexpr int kBytesA = rows * kMatrixRowBytes, kBytesB = columns * kMatrixRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kStagingBytes = kMathWarpgroups * 2 * kPieceBytes;
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes =
      kAlignment + stages * kStageBytes + kStagingBytes + 2 * stages * static_cast<int>(sizeof(Barrier));
  static_assert(kSharedBytes <= 227 * 1024);
};

template <typename Config>
struct SharedMemory {
  char* stages;
  char* staging;
  Barrier* full;
  Barrier* empty;

  __device__ explicit SharedMemory(char* memory) {
    stages = memory + (0u - shared_address(memory)) % Config::kAlignment;
    staging = stages + Config::kStages * Config::kStageBytes;
    full = reinterpret_cast<Barrier*>(staging + Config::kStagingBytes);
    empty = full + Config::kStages;
  }
  __device__ char* a(int stage) const { return stages + stage * Config::kStageBytes; }
  __device__ char* b(int stage) const { return a(stage) + Config::kBytesA; }
};

// A place in the ring; producer and consumers walk it alike.
template <int stages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Of this block in its cluster.
template <typename Config>
__device__ int cluster_rank() {
  return Config::kCluster == 1 ? 0 : blockIdx.x % Config::kCluster;
}

// One tile of D with the stretch of depth that goes into it. `row` may lie behind `row_end`: then the block works for
// the others of its cluster only.
struct Work {
  int32_t expert;
  int32_t row, row_end;  // forward: rows of D and where the group ends; wgrad: rows inside the expert's matrix
  int32_t column;
  int32_t depth, depth_end;

  Work() = default;
  // TMA counts all of these in 32 bits. A row past them is past any end as well.
  __device__ Work(int64_t expert, int64_t row, int64_t row_end, int64_t column, int64_t depth, int64_t depth_end)
      : expert(static_cast<int32_t>(expert)),
        row(static_cast<int32_t>(row < INT32_MAX ? row : INT32_MAX)),
        row_end(static_cast<int32_t>(row_end)),
        column(static_cast<int32_t>(column)),
        depth(static_cast<int32_t>(depth)),
        depth_end(static_cast<int32_t>(depth_end)) {}

  // Of the ring. At least one: an expert without rows multiplies a stage of zeros.
  __device__ int steps() const { return depth_end > depth ? (depth_end - depth - 1) / kBlockDepth + 1 : 1; }
};

// The blocks of a cluster go through the same tiles, of as many rows as they have together. For whole warps.
template <typename Config, bool wgrad = Config::kWgrad>
struct WorkQueue {
  const ProductArguments& arguments;
  GroupedRowTiles tiles;

  __device__ explicit WorkQueue(const ProductArguments& arguments)
      : arguments(arguments),
        tiles(arguments.expert_offsets, arguments.num_experts, arguments.max_rows, Config::kClusterRows,
              ceil_div(arguments.columns, Config::kTileColumns), blockIdx.x / Config::kCluster,
              gridDim.x / Config::kCluster) {}

  __device__ bool next(Work* work) {
    GroupedRowTiles::Tile found;
    if (!tiles.next(&found)) return false;
    *work = Work(found.expert, found.row + cluster_rank<Config>() * Config::kRows, found.end,
                 found.column * Config::kTileColumns, 0, arguments.depth);
    return true;
  }
};

// Every expert's matrix has the same tiles.
template <typename Config>
struct WorkQueue<Config, true> {
  const ProductArguments& arguments;
  int64_t tile = blockIdx.x / Config::kCluster;

  __device__ explicit WorkQueue(const ProductArguments& arguments) : arguments(arguments) {}

  __device__ bool next(Work* work) {
    const int64_t row_tiles = ceil_div(arguments.rows, Config::kClusterRows);
    const int64_t column_tiles = ceil_div(arguments.columns, Config::kColumns);
    const int64_t expert = tile / (row_tiles * column_tiles);
    if (expert >= arguments.num_experts) return false;
    const TilePosition position = banded_position(tile - expert * row_tiles * column_tiles, row_tiles, column_tiles);
    const RowRange range =
        rows_that_train(arguments.expert_offsets, arguments.trainable_experts, expert, arguments.max_rows);
    *work = Work(expert, position.row * Config::kClusterRows + cluster_rank<Config>() * Config::kRows, arguments.rows,
                 position.column * Config::kColumns, range.begin, range.end);
    tile += gridDim.x / Config::kCluster;
    return true;
  }
};

// ---- producer

template <typename Config>
__device__ void load_a(const ProductArguments& arguments, const Work& work, int depth, char* a, Barrier* full) {
#pragma unroll
  for (int box = 0; box < Config::kRows / Config::kBoxA; ++box) {
    char* target = a + box * Config::kBoxA * kMatrixRowBytes;
    const int row = work.row + box * Config::kBoxA;
    if constexpr (Config::kMajorA == Major::kK) {
      tma_load(arguments.a, full, target, depth, row);
    } else {
      tma_load(arguments.a, full, target, row, depth);
    }
  }
}

// Into every block of the cluster.
template <typename Config, typename... Coordinates>
__device__ void load_box_to_cluster(const TensorMap& map, Barrier* full, char* target, Coordinates... coordinates) {
  if constexpr (Config::kCluster == 1) {
    tma_load(map, full, target, coordinates...);
  } else {
    tma_load_to_cluster(map, full, target, (1u << Config::kCluster) - 1, coordinates...);
  }
}

// This block's share of B.
template <typename Config>
__device__ void load_b(const ProductArguments& arguments, const Work& work, int depth, char* b, Barrier* full) {
#pragma unroll
  for (int own = 0; own < Config::kBoxesB; ++own) {
    const int box = cluster_rank<Config>() * Config::kBoxesB + own;
    char* target = b + box * Config::kBoxB * kMatrixRowBytes;
    int column = work.column;
    if constexpr (Config::kPairsColumns) {
      constexpr int kHalf = Config::kWarpgroupColumns / 2;
      const int half = box * Config::kBoxB / kHalf;  // of some warpgroup; odd ones are ups
      column += half / 2 * kHalf + box * Config::kBoxB % kHalf;
      if (half % 2 == 1) column += static_cast<int>(arguments.columns);
    } else {
      column += box * Config::kBoxB;
    }
    if constexpr (Config::kWgrad) {
      load_box_to_cluster<Config>(arguments.b, full, target, column, depth);
    } else if constexpr (Config::kMajorB == Major::kK) {
      load_box_to_cluster<Config>(arguments.b, full, target, depth, column, work.expert);
    } else {
      load_box_to_cluster<Config>(arguments.b, full, target, column, depth, work.expert);
    }
  }
}

// One warp, of which one lane loads.
template <typename Config>
__device__ void produce(const ProductArguments& arguments, const SharedMemory<Config>& shared) {
  if (threadIdx.x >= kWarpSize) return;
  RingPosition<Config::kStages> position;
  WorkQueue<Config> queue(arguments);
  for (Work work; queue.next(&work);) {
    if (threadIdx.x != 0) continue;
    const int steps = work.steps();
#pragma unroll 1
    for (int step = 0; step < steps; ++step, position.advance()) {
      const int depth = work.depth + step * kBlockDepth;
      Barrier* full = &shared.full[position.stage];
      barrier_wait(&shared.empty[position.stage], position.phase ^ 1);
      barrier_arrive_expect(full, Config::kStageBytes);
      load_a<Config>(arguments, work, depth, shared.a(position.stage), full);
      load_b<Config>(arguments, work, depth, shared.b(position.stage), full);
    }
  }
}

// ---- math

// Zeroes what lies at depth `valid` and beyond in both (MN-major) operands of a stage: rows of another expert. In both,
// since zero times an infinity is NaN. All math threads must call.
template <typename Config>
__device__ void zero_depth_from(int valid, char* stage, int math_thread) {
  for (int byte = valid * kRowBytes + math_thread * 16; byte < kBlockBytes; byte += kMathThreads * 16) {
#pragma unroll
    for (int block = 0; block < Config::kStageBytes / kBlockBytes; ++block) {
      store_shared_16(stage + block * kBlockBytes + byte, Chunk{});
    }
  }
  fence_proxy_async();
  named_barrier(kMathBarrier, kMathThreads);
}

// What a math thread knows about its place.
struct MathThread {
  int warpgroup;     // of the math warpgroups
  int thread;        // of the warpgroup
  int first_row;     // of the warpgroup in the tile
  int first_column;  // likewise
};

// accumulators = the product over work's depth. Keeps one group of wgmmas in flight while the next stage arrives.
// `gathered`: an operand came by cp.async.
template <typename Config>
__device__ void multiply(bool gathered, const Work& work, const SharedMemory<Config>& shared, const MathThread& self,
                         RingPosition<Config::kStages>& position,
                         float (&accumulators)[Config::kWarpgroupColumns / 2]) {
  const int steps = work.steps();
  const auto release = [&](int stage) {
    const int lane = self.thread % kWarpSize;
    if constexpr (Config::kCluster == 1) {
      if (lane == 0) barrier_arrive(&shared.empty[stage]);
    } else {
      if (lane < Config::kCluster) barrier_arrive_at(&shared.empty[stage], lane);
    }
  };
  int previous = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    barrier_wait(&shared.full[position.stage], position.phase);
    if (gathered) fence_proxy_async();
    if constexpr (Config::kWgrad) {
      const int valid = work.depth_end - work.depth - step * kBlockDepth;
      if (valid < kBlockDepth) {
        zero_depth_from<Config>(valid, shared.a(position.stage), self.warpgroup * kWarpgroup + self.thread);
      }
    }
    const uint64_t a =
        make_descriptor(shared_address(shared.a(position.stage)) + self.first_row * kMatrixRowBytes, Config::kMajorA);
    const uint64_t b = make_descriptor(shared_address(shared.b(position.stage)) + self.first_column * kMatrixRowBytes,
                                       Config::kMajorB);
    hold_registers(accumulators);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockDepth / kInstructionDepth; ++k) {
      wgmma<typename Config::Element, Config::kWarpgroupColumns, Config::kMajorA, Config::kMajorB>(
          accumulators, a + k * step_bytes(Config::kMajorA) / 16, b + k * step_bytes(Config::kMajorB) / 16,
          step > 0 || k > 0);
    }
    wgmma_commit();
    hold_registers(accumulators);
    wgmma_wait<1>();
    if (step > 0) release(previous);
    previous = position.stage;
    position.advance();
  }
  wgmma_wait<0>();
  hold_registers(accumulators);
  release(previous);
}

template <typename Config>
__device__ void produce_gathered(const ProductArguments& arguments, const SharedMemory<Config>& shared);
template <typename Config>
__device__ void compute(const ProductArguments& arguments, const SharedMemory<Config>& shared, int warpgroup);

template <typename Config>
__device__ void sync_blocks() {
  if constexpr (Config::kCluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
}

template <typename Config>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(const MOE_GRID_CONSTANT ProductArguments arguments) {
  MOE_DYNAMIC_SHARED(char, memory);
  const SharedMemory<Config> shared(memory);
  const bool gathers = arguments.gather.source != nullptr;
  if (threadIdx.x == 0) {
    if (!gathers) {
      prefetch_map(arguments.a);
      prefetch_map(arguments.b);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      // One thread announces the bytes of TMA; the copies of each of the producer's arrive for themselves.
      barrier_init(&shared.full[stage], gathers ? 1 + kWarpgroup : 1);
      barrier_init(&shared.empty[stage], Config::kCluster * kMathThreads / kWarpSize);
    }
    barrier_init_fence();
  }
  sync_blocks<Config>();
  // The same for a whole warp, and known to be so by the compiler: descriptors stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    gathers ? produce_gathered<Config>(arguments, shared) : produce<Config>(arguments, shared);
  } else {
    take_registers<kMathRegisters>();
    compute<Config>(arguments, shared, warpgroup - 1);
  }
  // No block leaves while another may still arrive at its barriers.
  if constexpr (Config::kCluster > 1) cluster_sync();
}

}  // namespace moe_ext::sm90

#include "product_finish.h"
#include "product_gather.h"
