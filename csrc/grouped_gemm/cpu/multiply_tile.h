// One tile of a product on one thread.
//
// Sizes, for a core with 32 KiB of L1, 1 MiB of L2 (AMD Zen 4; more on Intel's servers) and 4-byte units:
//   right panel   256 deep x 32 columns             32 KiB   streams through L1, once for every strip of rows
//   left strip    14 rows x 256 deep                14 KiB   stays in L1 while a panel passes
//   left blocks   all blocks of up to 512 rows     544 KiB   stay in L2 for all columns of a tile, and the sums of a
//                 and blocks (4-byte units)                  panel, or a pair of them, in L1
// or, of more rows or a longer inner dimension,
//   left block    256 rows x (256 + 16) deep       272 KiB   stays in L2 for all panels of a block
//   sums          256 rows x 256 columns           256 KiB   stay in L2 from one block of the inner dimension to the
//                                                            next; fewer rows are wider, up to 96 x 1024, 384 KiB
// The rest of L2 is left to the weights that are fetched ahead and to a second panel. A panel of lines along the inner
// dimension is packed in 6 to 18 cycles for each vector of 16 units (four shuffles; the rest waits for memory and for
// translations of addresses) and then used one cycle for each row, on a Zen 5 half a cycle. That would be up to a fifth
// of the time at 64 rows: with AVX-512 float32 and pairs of bfloat16 are packed between the multiply-adds of the panel
// before (gemm_ahead.h). Where products whose lines run along the inner dimension on both sides have few rows, even
// that is too much: they take the weights as they lie. 25 to 96 rows are packed instead, as lanes, and each unit of a
// weight is broadcast to them (gemm_turned.h); fewer are multiplied 7 rows x 4 columns or 4 x 6 at a time, up to four
// column by column, and lanes are summed at the end (gemm_in_place.h). So are products of at most kFewRows rows the
// other way. choose_way in multiply_tile_cpu.cpp has the rule.
#pragma once

#include <functional>

#include "../matrices.h"
#include "gemm_kernels.h"

namespace moe_ext::cpu {

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileCols = 256;
constexpr int64_t kFewRows = 16;

// The kernels for factors of `dtype`, in the best instruction set that the machine has, or that MOE_EXT_CPU_ISA names.
// `output_dtype` is `dtype`, or float32 for 16-bit factors.
const GemmKernels& choose_kernels(ScalarType dtype, ScalarType output_dtype);
// Whether vectors of 64 bytes pass through the multipliers at once, two a cycle, so that packing weighs more beside
// arithmetic: not on AMD's family 25 (Zen 4), where they pass in halves.
bool multiplies_whole_vectors(const GemmKernels& kernels);

struct Tile {
  int64_t row, rows;
  int64_t col, cols;
};

// Finished sums of rows [row, row + rows) and columns [col, col + cols) of a product; `pair` are those of the same
// columns plus the product's pair.
struct TileSums {
  int64_t row, rows;
  int64_t col, cols;
  char* sums;
  char* pair;
  int64_t stride;  // elements between rows
};

struct Product {
  Matrix left;
  Matrix right;
  int64_t pair = 0;  // > 0: column c of the tile goes with column c + pair: gate and up
};

// Calls `finish` for every panel of the tile's columns, at most kernels.panel_cols wide, in one piece or in several of
// fewer rows. It may overwrite the sums.
void multiply_tile(const Product& product, const Tile& tile, const GemmKernels& kernels,
                   const std::function<void(const TileSums&)>& finish);

// Where a whole product is written as it is: row-major, contiguous, plus `bias` [cols] in the factors' type, if any.
struct Output {
  char* data;
  const char* bias = nullptr;
  bool stream = false;  // past the caches
};

// Writes the tile's part of `output`; the product has no pair.
void multiply_tile(const Product& product, const Tile& tile, const GemmKernels& kernels, const Output& output);

// Tiles of nearly equal size that cover a product, one of `num_products` of its kind; with a pair, the columns of its
// first half. Columns come in whole panels. Sizes never change a bit of the result, so they may depend on the number of
// threads.
class TileGrid {
 public:
  TileGrid(const Product& product, int64_t num_products, const GemmKernels& kernels);
  int64_t count() const { return row_tiles_ * col_tiles_; }
  Tile tile(int64_t index) const;  // all columns of the first rows come first

 private:
  int64_t rows_, cols_;
  int64_t tile_rows_, tile_cols_;
  int64_t row_tiles_, col_tiles_;
};

}  // namespace moe_ext::cpu
