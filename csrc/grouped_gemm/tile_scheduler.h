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

}  // namespace moe_ext
