// The compiled sm_90a configurations, and which one runs, from shapes alone (the group sizes are on the device). Plain
// C++, tested on the CPU.
//
// MOE_EXT_SM90_TILE=<name> forces a row of the table for every product, those of few rows (small_rows/) too, for
// sweeps; read at each launch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace moe_ext {

struct Sm90Tile {
  const char* name;
  int64_t rows, columns;  // of the tile of one block
  int cluster, stages;    // 0 stages: as many as CUTLASS finds room for
  int64_t rate_percent;   // of the tensor cores' rate when all blocks are busy: an assumption, not yet measured.
                          // 0: never chosen, only forced
};

// Clusters of one block: no multicast, so nothing ties a block's tile to the group of its neighbour's; CUTLASS's row
// has it. In the order of products.h. The first two columns and the stages are repeated in
// cmake/GroupedGemmKernels.cmake.
constexpr Sm90Tile kSm90Tiles[] = {
    {"128x256", 128, 256, 1, 4, 100},
    {"128x128", 128, 128, 1, 6, 85},
    {"64x256", 64, 256, 1, 4, 70},
    {"cutlass_128x256", 128, 256, 2, 0, 0},
};
constexpr int kNumSm90Tiles = sizeof(kSm90Tiles) / sizeof(kSm90Tiles[0]);
constexpr int kCutlassSm90Tile = kNumSm90Tiles - 1;

// Waves of blocks times the time of one block, for `groups` products of average shape rows x columns.
inline int64_t modelled_time(const Sm90Tile& tile, int64_t groups, int64_t rows, int64_t columns,
                             int64_t multiprocessors) {
  const int64_t tiles = groups * ((rows + tile.rows - 1) / tile.rows) * ((columns + tile.columns - 1) / tile.columns);
  const int64_t waves = (tiles + multiprocessors - 1) / multiprocessors;
  return waves * tile.rows * tile.columns * 100 / tile.rate_percent;
}

// A row of kSm90Tiles, -1 for none.
inline int forced_sm90_tile() {
  const char* forced = std::getenv("MOE_EXT_SM90_TILE");
  for (int i = 0; forced && i < kNumSm90Tiles; ++i) {
    if (std::strcmp(forced, kSm90Tiles[i].name) == 0) return i;
  }
  return -1;
}

// A row of kSm90Tiles.
inline int choose_sm90_tile(int64_t groups, int64_t rows, int64_t columns, int64_t multiprocessors) {
  if (const int forced = forced_sm90_tile(); forced >= 0) return forced;
  int best = 0;
  for (int i = 1; i < kNumSm90Tiles; ++i) {
    if (kSm90Tiles[i].rate_percent > 0 && modelled_time(kSm90Tiles[i], groups, rows, columns, multiprocessors) <
                                              modelled_time(kSm90Tiles[best], groups, rows, columns, multiprocessors)) {
      best = i;
    }
  }
  return best;
}

}  // namespace moe_ext
