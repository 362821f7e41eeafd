// Zeroes the permuted rows that hold no slot: padding and tail.
#pragma once

#include "../common/block_select.h"
#include "../common/row_access.h"
#include "../common/row_maps.h"

namespace moe_ext::cuda {

// Rows that one warp looks at: as much to write, if all are empty, as a token of top-8 has.
constexpr int kPaddingChunk = 8;

inline int64_t padding_chunks(const RowMaps& maps) { return ceil_div(maps.num_rows, kPaddingChunk); }

// One warp, the columns first_column, first_column + column_stride, ... of the rows of a chunk.
template <typename Packed>
__device__ void zero_padding_rows(const int32_t* permuted_to_slot, Packed* rows, const RowMaps& maps, int64_t chunk,
                                  int64_t row_vectors, int64_t first_column, int64_t column_stride) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = chunk * kPaddingChunk;
  bool empty = false;
  if (lane < kPaddingChunk && first + lane < maps.num_rows) {
    const int32_t slot = permuted_to_slot[first + lane];
    empty = slot < 0 || slot >= maps.num_slots;
  }
  const unsigned ballot = __ballot_sync(kFullMask, empty);
  for (int r = 0; r < kPaddingChunk; ++r) {
    if (!(ballot >> r & 1)) continue;
    Packed* row = rows + (first + r) * row_vectors;
    for (int64_t column = first_column; column < row_vectors; column += column_stride) row[column] = Packed{};
  }
}

}  // namespace moe_ext::cuda
