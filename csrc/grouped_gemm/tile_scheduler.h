// Which tile a block works on. Plain C++ as well: tests/test_tile_scheduler.py runs this very code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_TILE_FUNCTION __host__ __device__ inline
#else
#define MOE_TILE_FUNCTION inline
#endif

namespace moe_ext {

struct RowRange {
  int64_t begin, end;
};

// Clamped to [0, max_rows]; empty where the offsets run backwards.
MOE_TILE_FUNCTION RowRange rows_of_expert(const int32_t* expert_offsets, int64_t expert, int64_t max_rows) {
  int64_t begin = expert_offsets[expert], end = expert_offsets[expert + 1];
  begin = begin < 0 ? 0 : begin > max_rows ? max_rows : begin;
  end = end < begin ? begin : end > max_rows ? max_rows : end;
  return {begin, end};
}

// None for an expert whose weights are not trained; null trains all.
MOE_TILE_FUNCTION RowRange rows_that_train(const int32_t* expert_offsets, const bool* trainable_experts, int64_t expert,
                                           int64_t max_rows) {
  RowRange range = rows_of_expert(expert_offsets, expert, max_rows);
  if (trainable_experts && !trainable_experts[expert]) range.end = range.begin;
  return range;
}

struct RowTile {
  int64_t expert;
  RowRange rows;
};

// Expert e owns the tile numbers from offsets[e] / block_rows + e on: a number that needs no prefix sum of tile counts,
// since floor(begin / b) + ceil(rows / b) <= floor(end / b) + 1. Numbers that no tile takes are idle.
MOE_TILE_FUNCTION int64_t row_tile_bound(int64_t max_rows, int64_t num_experts, int64_t block_rows) {
  return max_rows / block_rows + num_experts;
}

// The tile with this number; `rows` is empty if it is idle.
MOE_TILE_FUNCTION RowTile find_row_tile(const int32_t* expert_offsets, int64_t num_experts, int64_t max_rows,
                                        int64_t block_rows, int64_t tile) {
  int64_t low = 0, high = num_experts;  // the last expert whose first number is <= tile
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const RowRange range = rows_of_expert(expert_offsets, middle, max_rows);
    if (range.begin / block_rows + middle <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  RowRange range = rows_of_expert(expert_offsets, low, max_rows);
  const int64_t begin = range.begin + (tile - range.begin / block_rows - low) * block_rows;
  if (begin < range.begin || begin >= range.end) return {low, {0, 0}};
  const int64_t end = begin + block_rows < range.end ? begin + block_rows : range.end;
  return {low, {begin, end}};
}

// ---- the persistent sm_90a kernels

struct TilePosition {
  int64_t row, column;  // in tiles
};

// Order inside one product: bands of kBandTiles row tiles, down a band's column before the next column, so that the
// column block of B (a weight) is read by a band of tiles at about the same time and stays in L2.
constexpr int64_t kBandTiles = 8;

MOE_TILE_FUNCTION TilePosition banded_position(int64_t index, int64_t row_tiles, int64_t column_tiles) {
  const int64_t band = index / (kBandTiles * column_tiles);
  const int64_t within = index - band * kBandTiles * column_tiles;
  const int64_t left = row_tiles - band * kBandTiles;
  const int64_t height = left < kBandTiles ? left : kBandTiles;
  return {band * kBandTiles + within % height, within / height};
}

// The tiles of one block: numbers first, first + step, ... of all experts' tiles, counted expert by expert without a
// gap, so that blocks share them evenly however skewed the groups are. Walks expert_offsets once, reading each entry
// when its turn comes; ends for any offsets.
struct GroupedRowTiles {
  const int32_t* expert_offsets;
  int64_t num_experts, max_rows, block_rows, column_tiles;
  int64_t tile, step;
  int64_t expert = 0, first_of_expert = 0;

  struct Tile {
    int64_t expert, row, end, column;  // rows row to end (of the group, maybe more than a tile), column in tiles
  };

  // False when there are no more.
  MOE_TILE_FUNCTION bool next(Tile* found) {
    for (; expert < num_experts; ++expert) {
      const RowRange rows = rows_of_expert(expert_offsets, expert, max_rows);
      const int64_t row_tiles = (rows.end - rows.begin + block_rows - 1) / block_rows;
      const int64_t index = tile - first_of_expert;
      if (index < row_tiles * column_tiles) {
        const TilePosition position = banded_position(index, row_tiles, column_tiles);
        *found = {expert, rows.begin + position.row * block_rows, rows.end, position.column};
        tile += step;
        return true;
      }
      first_of_expert += row_tiles * column_tiles;
    }
    return false;
  }
};

}  // namespace moe_ext
