// Which sm_90a tile to run, from shapes alone (the group sizes are on the device). Plain C++, tested on the CPU.
#pragma once

#include <cstdint>

namespace moe_ext {

enum class Sm90Tile { kCooperative, kPingpong };

struct TileModel {
  Sm90Tile tile;
  int64_t rows, columns;  // of one block
  int64_t rate_percent;   // of the tensor cores' rate when all blocks are busy: an assumption, not yet measured
};

constexpr TileModel kSm90Tiles[] = {
    {Sm90Tile::kCooperative, 128, 256, 100},
    {Sm90Tile::kPingpong, 64, 128, 75},
};

// Waves of blocks times the time of one block, for `groups` products of average shape rows x columns.
inline int64_t modelled_time(const TileModel& model, int64_t groups, int64_t rows, int64_t columns,
                             int64_t multiprocessors) {
  const int64_t tiles =
      groups * ((rows + model.rows - 1) / model.rows) * ((columns + model.columns - 1) / model.columns);
  const int64_t waves = (tiles + multiprocessors - 1) / multiprocessors;
  return waves * model.rows * model.columns * 100 / model.rate_percent;
}

inline Sm90Tile choose_sm90_tile(int64_t groups, int64_t rows, int64_t columns, int64_t multiprocessors) {
  const TileModel* best = &kSm90Tiles[0];
  for (const TileModel& model : kSm90Tiles) {
    if (modelled_time(model, groups, rows, columns, multiprocessors) <
        modelled_time(*best, groups, rows, columns, multiprocessors)) {
      best = &model;
    }
  }
  return best->tile;
}

}  // namespace moe_ext
