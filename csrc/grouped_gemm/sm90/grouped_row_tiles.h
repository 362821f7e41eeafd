// The tiles of one block, or cluster, of the persistent kernels. tests/test_tile_scheduler.py runs this very code,
// emulated.
#pragma once

#include "../../common/cuda_launch.h"
#include "../tile_scheduler.h"

namespace moe_ext::sm90 {

struct TilePosition {
  int64_t row, column;  // in tiles
};

// Order inside one product: bands of kBandTiles row tiles, down a band's column before the next column, so that the
// column block of B (a weight) is read by a band of tiles at about the same time and stays in L2.
constexpr int64_t kBandTiles = 8;

__device__ inline TilePosition banded_position(int64_t index, int64_t row_tiles, int64_t column_tiles) {
  const int64_t band = index / (kBandTiles * column_tiles);
  const int64_t within = index - band * kBandTiles * column_tiles;
  const int64_t left = row_tiles - band * kBandTiles;
  const int64_t height = left < kBandTiles ? left : kBandTiles;
  return {band * kBandTiles + within % height, within / height};
}

// Tiles number first, first + step, ... of all experts' tiles, counted expert by expert without a gap, so that blocks
// share them evenly however skewed the groups are. A warp walks expert_offsets once, 32 experts at a time; all of its
// lanes must call. Ends for any offsets.
class GroupedRowTiles {
 public:
  struct Tile {
    int64_t expert, row, end, column;  // rows row to end (of the group, maybe more than a tile), column in tiles
  };

  __device__ GroupedRowTiles(const int32_t* expert_offsets, int64_t num_experts, int64_t max_rows, int64_t block_rows,
                             int64_t column_tiles, int64_t first, int64_t step)
      : expert_offsets_(expert_offsets),
        num_experts_(num_experts),
        max_rows_(max_rows),
        block_rows_(block_rows),
        column_tiles_(column_tiles),
        step_(step),
        ahead_(first) {
    count();
  }

  // False when there are no more.
  __device__ bool next(Tile* found) {
    for (;;) {
      if (const unsigned later = __ballot_sync(kAllLanes, ahead_ < end_)) {
        const int lane = __ffs(static_cast<int>(later)) - 1;
        const int64_t row_begin = __shfl_sync(kAllLanes, rows_begin_, lane);
        const int64_t row_end = __shfl_sync(kAllLanes, rows_end_, lane);
        const int64_t row_tiles = ceil_div(row_end - row_begin, block_rows_);
        const int64_t first = __shfl_sync(kAllLanes, end_, lane) - row_tiles * column_tiles_;
        const TilePosition position = banded_position(ahead_ - first, row_tiles, column_tiles_);
        *found = {first_expert_ + lane, row_begin + position.row * block_rows_, row_end, position.column};
        ahead_ += step_;
        return true;
      }
      ahead_ -= __shfl_sync(kAllLanes, end_, kWarpSize - 1);
      first_expert_ += kWarpSize;
      if (first_expert_ >= num_experts_) return false;
      count();
    }
  }

 private:
  static constexpr unsigned kAllLanes = 0xffffffffu;

  // Read anew each time: what the scan asks of a lane known from the start is kept, and spilled, all through the
  // kernel.
  __device__ static int own_lane() {
#ifdef MOE_EXT_EMULATED
    return threadIdx.x % kWarpSize;
#else
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
#endif
  }

  // Lane l: the rows of expert first_expert_ + l, and where its tiles end. Row tiles fit 32 bits, tiles may not.
  __device__ void count() {
    const int lane = own_lane();
    RowRange rows = {0, 0};
    if (first_expert_ + lane < num_experts_) {
      rows = rows_of_expert(expert_offsets_, first_expert_ + lane, max_rows_);
    }
    rows_begin_ = static_cast<int32_t>(rows.begin);
    rows_end_ = static_cast<int32_t>(rows.end);
    auto row_tiles = static_cast<int32_t>(ceil_div(rows.end - rows.begin, block_rows_));
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, row_tiles, offset);
      if (lane >= offset) row_tiles += below;
    }
    end_ = row_tiles * column_tiles_;
  }

  const int32_t* expert_offsets_;
  int64_t num_experts_, max_rows_, block_rows_, column_tiles_, step_;
  int first_expert_ = 0;           // of the 32 at hand
  int64_t ahead_;                  // the next tile, counted from their first
  int64_t end_;                    // of the lane's expert's tiles, likewise
  int32_t rows_begin_, rows_end_;  // of the lane's expert
};

}  // namespace moe_ext::sm90
