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
  int cluster;            // blocks that share B by multicast, of neighbouring rows
  int stages;             // 0: as many as CUTLASS finds room for
  int64_t rate_percent;   // of the tensor cores' rate when all blocks are busy: an assumption, not yet measured.
                          // 0: never chosen, only forced
};

// In the order of products.h; all but CUTLASS's row are repeated in cmake/GroupedGemmKernels.cmake. A cluster reads a
// third less from L2, but a group with an odd number of row tiles leaves one of its blocks without work: until it has
// been measured it is only forced.
// clang-format off
constexpr Sm90Tile kSm90Tiles[] = {
    {"128x256", 128, 256, 1, 4, 100},
    {"128x128", 128, 128, 1, 6, 85},
    {"64x256", 64, 256, 1, 4, 70},
    {"128x256x2", 128, 256, 2, 4, 0},
    {"cutlass_128x256", 128, 256, 2, 0, 0},
};
// clang-format on
constexpr int kNumSm90Tiles = sizeof(kSm90Tiles) / sizeof(kSm90Tiles[0]);
constexpr int kCutlassSm90Tile = kNumSm90Tiles - 1;

// Waves of blocks times the time of one block, for `groups` products of average shape rows x columns.
inline int64_t modelled_time(const Sm90Tile& tile, int64_t groups, int64_t rows, int64_t columns,
                             int64_t multiprocessors) {
  const int64_t cluster_rows = tile.rows * tile.cluster, clusters = multiprocessors / tile.cluster;
  const int64_t tiles =
      groups * ((rows + cluster_rows - 1) / cluster_rows) * ((columns + tile.columns - 1) / tile.columns);
  const int64_t waves = (tiles + clusters - 1) / clusters;
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
