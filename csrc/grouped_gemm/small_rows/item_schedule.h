// Which part of which product a block, a warp and a thread of the small-rows kernel work on. Plain C++ as well:
// tests/test_small_rows_schedule.py runs this very code.
//
// An item is (expert, row chunk, column tile). Items of one expert are numbered together, the chunks of a column tile
// next to each other: blocks that read the same weights run at the same time and meet in L2. Blocks take items
// blockIdx.x, blockIdx.x + gridDim.x, ...; the steps along k of an item are dealt to the warps of its block in turn.
#pragma once

#include "../tile_scheduler.h"

namespace moe_ext::small_rows {

constexpr int kTileColumns = 64;  // rows of W^T, the output features, of an item
constexpr int kGroupLanes = 8;    // lane l of a warp is (group l / 4, member l % 4), as in the fragments of mma.sync
constexpr int kGroupMembers = 4;  // the four members of a group hold consecutive 16-byte vectors along k
constexpr int kColumnsPerThread = 8;  // of the tile, one per vector of weights (enk) or spread over vectors (ekn)

struct Item {
  int64_t expert;
  RowRange rows;
  int64_t column_tile;
};

MOE_TILE_FUNCTION int64_t row_chunks(RowRange rows, int64_t chunk_rows) {
  return (rows.end - rows.begin + chunk_rows - 1) / chunk_rows;
}

// No more items than this, whatever the offsets, unless they run backwards.
MOE_TILE_FUNCTION int64_t item_bound(int64_t max_rows, int64_t num_experts, int64_t chunk_rows, int64_t column_tiles) {
  const int64_t used = max_rows < num_experts ? max_rows : num_experts;
  return (used + max_rows / chunk_rows) * column_tiles;
}

// `chunk_starts` [num_experts + 1]: exclusive prefix sums of row_chunks; `item` < chunk_starts[num_experts] *
// column_tiles. The items of one expert must be fewer than 2^32: division by 64 bits is slow on a GPU.
MOE_TILE_FUNCTION Item find_item(const int32_t* chunk_starts, const int32_t* expert_offsets, int num_experts,
                                 int64_t max_rows, int64_t chunk_rows, int64_t column_tiles, int64_t item) {
  int low = 0, high = num_experts;  // the last expert whose first item is <= item: it is not empty
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (chunk_starts[middle] * column_tiles <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const uint32_t chunks = chunk_starts[low + 1] - chunk_starts[low];
  const auto local = static_cast<uint32_t>(item - chunk_starts[low] * column_tiles);
  const RowRange range = rows_of_expert(expert_offsets, low, max_rows);
  const int64_t begin = range.begin + local % chunks * chunk_rows;
  return {low, {begin, begin + chunk_rows < range.end ? begin + chunk_rows : range.end}, local / chunks};
}

// Step i of a warp is step warp + i * warps of the item; this many steps are its own.
MOE_TILE_FUNCTION int steps_of_warp(int steps, int warp, int warps) {
  return warp < steps ? (steps - warp - 1) / warps + 1 : 0;
}

// Column of the tile that thread-column q of a lane group holds. enk: vectors lie along k, one column each. ekn:
// vectors of `width` columns; a row of the tile is kTileColumns / width of them.
MOE_TILE_FUNCTION int tile_column(bool enk, int width, int q, int group) {
  return enk ? q * kGroupLanes + group : (q / width * kGroupLanes + group) * width + q % width;
}

struct ThreadColumn {
  int q, group;
};

// The inverse of tile_column.
MOE_TILE_FUNCTION ThreadColumn holder_of_column(bool enk, int width, int column) {
  if (enk) return {column / kGroupLanes, column % kGroupLanes};
  const int vector = column / width;
  return {vector / kGroupLanes * width + column % width, vector % kGroupLanes};
}

}  // namespace moe_ext::small_rows
