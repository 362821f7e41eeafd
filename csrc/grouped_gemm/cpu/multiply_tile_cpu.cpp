#include "multiply_tile.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../common/huge_pages.h"
#include "../../common/stream_rows.h"

namespace moe_ext::cpu {
namespace {

// Tiles are narrowed down to this while there are fewer than kTilesPerThread for each thread.
constexpr int64_t kSmallestTile = 64;
constexpr int64_t kTilesPerThread = 8;
// Bytes of a line that is swept, or of a half with a pair. Shorter pieces are read at two thirds of the rate: what the
// hardware fetches past their ends is lost. Only a thread without a tile is worth that.
constexpr int64_t kShortestSweep = 2048;
// Lines along the inner dimension are packed on the side where that many strips of rows pass over a panel: beside fewer
// there is too little arithmetic.
constexpr int64_t kStripsToPackAhead = 3;
// Up to so many sums of a column a tile is four times as wide.
constexpr int64_t kWideRowsBytes = 96 * 4;
constexpr int64_t kFewRowsWider = 4;  // few rows read faster than they multiply: memory waits where a tile begins
constexpr int64_t kSweepCols = kTileRows * kTileCols / kFewRows;  // the widest tile that is swept
constexpr int64_t kSweepStride = kSweepCols + 48;  // not a power of two, or rows of sums would crowd a set of L1
constexpr int64_t kDotRowsBytes = 448 << 10;  // of packed rows: they stay in L2, and their lines are not so far apart
                                              // that they crowd a set of L1
constexpr int64_t kDotRowsRoom = 32;          // units between packed rows, which are then not a power of two apart
constexpr int64_t kFewestTurnedRows = 25;
constexpr int64_t kMostRestRows = 8;  // after whole vectors of turned rows; so many cost less with `dot`

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one thread works in; kept from call to call. On a huge page: L2 is indexed by physical addresses, so that blocks
// on small pages crowd some of its sets.
struct Scratch {
  // Packing writes whole vectors, so a block may be a vector's worth of rows larger than the tile.
  static constexpr int64_t kLeftBytes = (kTileRows + 16) * kLeftStride * static_cast<int64_t>(sizeof(double));

  std::unique_ptr<char, void (*)(void*)> memory{nullptr, &std::free};
  char *left, *right, *next_right, *sums;
  std::vector<const char*> left_lines, right_lines;

  Scratch() {
    constexpr int64_t kUnit = sizeof(double);
    constexpr int64_t kLeft = kLeftBytes, kRight = (kDepth + 16) * kMaxPanelCols * kUnit;
    constexpr int64_t kSums = kTileRows * (kTileCols + 2 * kDotRoom) * kUnit;
    static_assert(4 * kTileCols * kWideRowsBytes <= kSums);
    static_assert(kFewRows * std::max(kSweepStride, kFewRowsWider * kTileCols + 2 * kDotRoom) * kUnit <= kSums);
    static_assert(kDotRowsBytes + kTileRows * (64 + kDotRowsRoom * kUnit) <= kLeft);
    memory.reset(static_cast<char*>(allocate_on_huge_pages(kLeft + 2 * kRight + kSums)));
    MOE_CHECK(memory, "grouped_gemm: out of memory for the scratch space of a thread");
    left = memory.get(), right = left + kLeft, next_right = right + kRight, sums = next_right + kRight;
  }
};

// Appends pointers to the start of lines [first, first + count) of `matrix`.
void add_lines(const Matrix& matrix, int64_t first, int64_t count, int64_t element_bytes,
               std::vector<const char*>& lines) {
  const int64_t stride = matrix.line_stride * element_bytes;
  const Gather& gather = matrix.gather;
  for (int64_t i = first; i < first + count; ++i) {
    if (!gather.slots) {
      lines.push_back(matrix.data + i * stride);
    } else {
      lines.push_back(gather.holds(i) ? matrix.data + gather.slots[i] / gather.topk * stride : nullptr);
    }
  }
}

// The panels of a tile's columns: with a pair, each is followed by its partner.
struct Panels {
  int64_t first_col, num_cols, pair, width;

  int64_t count() const { return divide_up(num_cols, width) * (pair ? 2 : 1); }
  int64_t col(int64_t panel) const { return (pair ? panel / 2 : panel) * width; }  // in the tile
  int64_t cols(int64_t panel) const { return std::min(width, num_cols - col(panel)); }
  int64_t source(int64_t panel) const { return first_col + col(panel) + (pair && panel % 2 ? pair : 0); }
  bool completes(int64_t panel) const { return !pair || panel % 2; }
};

// Blocks of the inner dimension; at least one, so that a product over nothing still gives its zeros.
int64_t num_blocks(const Product& product, const GemmKernels& kernels) {
  return std::max<int64_t>(1, divide_up(product.left.cols, kDepth * kernels.elements_per_unit));
}

// Whether all blocks of a tile's left rows lie packed side by side.
bool left_stays(const Product& product, int64_t rows, const GemmKernels& kernels) {
  constexpr int64_t kUnit = sizeof(double);
  return rows * num_blocks(product, kernels) * kernels.unit_bytes <= kTileRows * kUnit;
}

// The right panels that a tile takes one after the other. If the left rows stay, all blocks of the inner dimension of
// one panel, then those of the next: its sums stay in L1, and lines along the inner dimension are used from end to end.
// Else all panels for one block, then all for the next.
class PanelSteps {
 public:
  PanelSteps(const Product& product, const Tile& tile, const GemmKernels& kernels, bool left_stays,
             std::vector<const char*>& lines)
      : panels(Panels{tile.col, tile.cols, product.pair, kernels.panel_cols}),
        kernels_(kernels),
        inner_(product.left.cols),
        num_panels_(panels.count()),
        num_blocks_(num_blocks(product, kernels)),
        left_stays_(left_stays),
        packs_inner_ahead_(kernels.packs_ahead && tile.rows > kStripsToPackAhead * kernels.strip_rows),
        lines_are_cols_(!product.right.lines_are_rows),
        holes_(product.right.gather.slots != nullptr),
        lines_(lines) {
    lines.clear();
    if (lines_are_cols_) {
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        add_lines(product.right, panels.source(panel), panels.cols(panel), kernels.element_bytes, lines);
      }
    } else {
      add_lines(product.right, 0, inner_, kernels.element_bytes, lines);
    }
  }

  int64_t count() const { return num_blocks_ * num_panels_; }
  int64_t panel(int64_t step) const { return left_stays_ ? step / num_blocks_ : step % num_panels_; }
  int64_t block(int64_t step) const { return left_stays_ ? step % num_blocks_ : step / num_panels_; }
  bool last_block(int64_t step) const { return block(step) == num_blocks_ - 1; }
  int64_t first(int64_t step) const { return block(step) * block_elements(); }  // of the inner dimension
  int64_t elements(int64_t step) const { return std::min(block_elements(), inner_ - first(step)); }

  void pack(int64_t step, char* right) const {
    const int64_t cols = panels.cols(panel(step));
    if (lines_are_cols_) {
      kernels_.pack_right_inner(right, lines(step), cols, first(step), elements(step));
    } else {
      kernels_.pack_right_outer(right, lines(step), elements(step), panels.source(panel(step)), cols);
    }
  }

  // Packs `step` into `right`, if that can be done on the side, and fetches what is packed after it.
  Ahead ahead(int64_t step, char* right) const {
    if (!packs_ahead(step)) return {.after = fetch(step)};
    return {right,          lines(step),     lines_are_cols_ ? first(step) : panels.source(panel(step)),
            elements(step), lines_are_cols_, fetch(step + 1)};
  }

  bool packs_ahead(int64_t step) const {
    if (!kernels_.packs_ahead || step >= count() || panels.cols(panel(step)) < panels.width) return false;
    return !lines_are_cols_ || (packs_inner_ahead_ && elements(step) % kernels_.vector_elements == 0 && !holes_);
  }

  const Panels panels;

 private:
  int64_t block_elements() const { return kDepth * kernels_.elements_per_unit; }

  const char* const* lines(int64_t step) const {
    if (!lines_are_cols_) return lines_.data() + first(step);
    // In the order of the panels, of which only the last, or a pair's last two, may be narrower.
    const int64_t pairs = panels.pair ? 2 : 1, p = panel(step);
    return lines_.data() + p / pairs * pairs * panels.width + p % pairs * panels.cols(p);
  }

  Fetch fetch(int64_t step) const {
    const int64_t bytes = kernels_.element_bytes;
    if (left_stays_ && lines_are_cols_ && packs_inner_ahead_) {
      // Lines of the panel after that of the step before, from end to end: memory answers soonest so.
      const int64_t p = panel(step - 1) + 1, b = block(step - 1);
      if (p >= num_panels_) return {};
      const int64_t cols = panels.cols(p), from = cols * b / num_blocks_, to = cols * (b + 1) / num_blocks_;
      return {lines(p * num_blocks_) + from, to - from, 0, inner_ * bytes};
    }
    if (step >= count()) return {};
    const int64_t cols = panels.cols(panel(step));
    if (lines_are_cols_) return {lines(step), cols, first(step) * bytes, elements(step) * bytes};
    return {lines(step), elements(step), panels.source(panel(step)) * bytes, cols * bytes};
  }

  const GemmKernels& kernels_;
  int64_t inner_, num_panels_, num_blocks_;
  bool left_stays_, packs_inner_ahead_;
  bool lines_are_cols_, holes_;  // holes: lines may be null
  const std::vector<const char*>& lines_;
};

// `output` is null, or what `finish` writes: whole panels go there from the registers.
void multiply_packed(const Product& product, const Tile& tile, const GemmKernels& kernels,
                     const std::function<void(const TileSums&)>& finish, const Output* output, Scratch& scratch) {
  const int64_t element = kernels.element_bytes, inner = product.left.cols;
  const bool left_inner = product.left.lines_are_rows;
  const int64_t panel_bytes = tile.rows * kernels.panel_cols * kernels.unit_bytes;
  scratch.left_lines.clear();
  add_lines(product.left, left_inner ? tile.row : 0, left_inner ? tile.rows : inner, element, scratch.left_lines);
  const bool stays = left_stays(product, tile.rows, kernels);
  const PanelSteps steps(product, tile, kernels, stays, scratch.right_lines);
  const Panels& panels = steps.panels;
  const int64_t num_steps = steps.count(), left_bytes = tile.rows * kLeftStride * kernels.unit_bytes;
  char *right = scratch.right, *next_right = scratch.next_right;
  bool packed = false;
  for (int64_t step = 0; step < num_steps; ++step) {
    const int64_t panel = steps.panel(step), k = steps.first(step), count = steps.elements(step);
    const int64_t depth = divide_up(count, kernels.elements_per_unit), cols = panels.cols(panel);
    const bool first = k == 0, last = steps.last_block(step);
    char* left = scratch.left + (stays ? steps.block(step) * left_bytes : 0);
    if (panel == 0 && left_inner) {
      kernels.pack_left_inner(left, kLeftStride, scratch.left_lines.data(), tile.rows, k, count);
    } else if (panel == 0) {
      kernels.pack_left_outer(left, scratch.left_lines.data() + k, count, tile.row, tile.rows);
    }
    if (!packed) steps.pack(step, right);
    const Ahead ahead = steps.ahead(step + 1, next_right);
    packed = ahead.right != nullptr;
    char* sums = scratch.sums + (stays ? panel % 2 : panel) * panel_bytes;
    if (last && output && cols == kernels.panel_cols) {
      const int64_t col = panels.source(panel), stride = product.right.cols * kernels.output_bytes;
      kernels.multiply(left, right, tile.rows, depth, sums, first,
                       {output->data + tile.row * stride + col * kernels.output_bytes, stride,
                        output->bias ? output->bias + col * element : nullptr, output->stream},
                       ahead);
    } else if (first && last && !product.pair) {
      // One block: every strip is finished as it comes, so that writing it overlaps with the next one's arithmetic.
      for (int64_t row = 0; row < tile.rows; row += kernels.strip_rows) {
        const int64_t rows = std::min(kernels.strip_rows, tile.rows - row);
        kernels.multiply(left + row * kLeftStride * kernels.unit_bytes, right, rows, depth, scratch.sums, true, {},
                         row == 0 ? ahead : Ahead{});
        finish({tile.row + row, rows, panels.source(panel), cols, scratch.sums, nullptr, kernels.panel_cols});
      }
    } else {
      kernels.multiply(left, right, tile.rows, depth, sums, first, {}, ahead);
      if (last && panels.completes(panel)) {
        finish({tile.row, tile.rows, tile.col + panels.col(panel), cols, product.pair ? sums - panel_bytes : sums,
                product.pair ? sums : nullptr, kernels.panel_cols});
      }
    }
    if (packed) std::swap(right, next_right);
  }
}

constexpr int64_t kDotLineBytes = 2048;  // of a packed row, where 5 to 32 of them and six columns shall stay in L1

// How a product is computed: by all of it, so that how it is cut changes no bit.
enum class Way { kPacked, kTurned, kDot, kAxpy };

// The widest tile of `dot`.
int64_t dot_cols(int64_t rows) { return (rows <= kFewRows ? kFewRowsWider : 1) * kTileCols; }

// Elements of the inner dimension that `dot` takes at once.
int64_t dot_depth(int64_t rows, int64_t inner, const GemmKernels& kernels) {
  const int64_t vector = kernels.vector_elements, line_bytes = inner / kernels.elements_per_unit * kernels.unit_bytes;
  const bool in_l1 = rows > 4 && rows <= 32;  // fewer need no more than a line each; more are summed up too often
  const int64_t bytes = in_l1 ? line_bytes : std::min(rows, kTileRows) * line_bytes;
  const int64_t blocks = std::max<int64_t>(1, divide_up(bytes, in_l1 ? kDotLineBytes : kDotRowsBytes));
  return std::max<int64_t>(1, divide_up(divide_up(inner, blocks), vector)) * vector;
}

// How the rows of a turned product lie packed: `turned` of them in panels, behind them the rest one after the other.
// Which they are is up to the product, not to a tile: it decides about bits.
struct TurnedRows {
  int64_t turned, rest;
  int64_t panel_units, panels;
  int64_t rest_stride;

  TurnedRows(const Product& product, const GemmKernels& kernels) {
    const int64_t rows = product.left.rows, vector = kernels.panel_cols / 2;
    rest = rows % vector <= kMostRestRows ? rows % vector : 0;
    turned = rows - rest;
    const int64_t units = divide_up(product.left.cols, kernels.vector_elements) * vector;
    panel_units = units * kernels.panel_cols, panels = divide_up(turned, kernels.panel_cols);
    rest_stride = units + kDotRowsRoom;
  }

  int64_t units() const { return panels * panel_units + rest * rest_stride; }
};

Way choose_way(const Product& product, const GemmKernels& kernels) {
  const int64_t rows = product.left.rows;
  if (!product.left.lines_are_rows) return Way::kPacked;
  if (product.right.lines_are_rows) return rows <= kFewRows ? Way::kAxpy : Way::kPacked;
  if (rows <= kFewRows) return Way::kDot;
  // Weights that are widened are widened once for all rows.
  if (kernels.element_bytes * kernels.elements_per_unit < kernels.unit_bytes) return Way::kPacked;
  if (multiplies_whole_vectors(kernels)) {
    const bool turns =
        kernels.turned && !product.right.gather.slots && rows >= kFewestTurnedRows && rows <= kTurnedRows;
    if (turns && TurnedRows(product, kernels).units() * kernels.unit_bytes <= Scratch::kLeftBytes) return Way::kTurned;
    return rows <= kFewRows * kernels.elements_per_unit ? Way::kDot : Way::kPacked;
  }
  // Cycles for each vector of weights elsewhere, as on a Zen 4: to pack it 18; to sum the lanes of what `dot`
  // accumulated 3.2 for each row, once in `steps`, and 0.03 for each row, because it needs more of the cache.
  const int64_t steps = dot_depth(rows, product.left.cols, kernels) / kernels.vector_elements;
  return rows * (steps + 107) <= 600 * steps ? Way::kDot : Way::kPacked;
}

// Rows, all of them in one tile, are packed once; columns are read in place, a group of them after the other.
void multiply_turned(const Product& product, const Tile& tile, const GemmKernels& kernels,
                     const std::function<void(const TileSums&)>& finish, Scratch& scratch) {
  const int64_t inner = product.left.cols, unit = kernels.unit_bytes, halves = product.pair ? 2 : 1;
  const TurnedRows rows(product, kernels);
  scratch.left_lines.clear();
  add_lines(product.left, tile.row, tile.rows, kernels.element_bytes, scratch.left_lines);
  for (int64_t panel = 0; panel < rows.panels; ++panel) {
    const int64_t first = panel * kernels.panel_cols;
    kernels.pack_right_inner(scratch.left + panel * rows.panel_units * unit, scratch.left_lines.data() + first,
                             std::min(kernels.panel_cols, rows.turned - first), 0, inner);
  }
  char* rest = scratch.left + rows.panels * rows.panel_units * unit;
  kernels.pack_left_inner(rest, rows.rest_stride, scratch.left_lines.data() + rows.turned, rows.rest, 0, inner);
  const int64_t rest_depth = dot_depth(rows.rest, inner, kernels);

  const int64_t stride_bytes = product.right.line_stride * kernels.element_bytes;
  const auto column = [&](int64_t col, int64_t half) {
    return product.right.data + (tile.col + col + half * product.pair) * stride_bytes;
  };
  // Sums lie as [rows][kTurnedStride], a pair's second half behind the first.
  constexpr int64_t kTurnedStride = kTurnedCols + 2 * kDotRoom, kPairAt = kTurnedStride / 2;
  const int64_t width = kTurnedCols / halves;
  for (int64_t col = 0; col < tile.cols; col += width) {
    const int64_t cols = std::min(width, tile.cols - col);
    for (int64_t half = 0; half < halves; ++half) {
      const bool pair_follows = half + 1 < halves, last = col + width >= tile.cols;
      const char *here = column(col, half), *next = pair_follows ? column(col, 1) : column(last ? col : col + width, 0);
      char* sums = scratch.sums + half * kPairAt * unit;
      kernels.turned(scratch.left, rows.panel_units, rows.turned, here, stride_bytes, cols, inner, next, sums,
                     kTurnedStride);
      if (rows.rest == 0) continue;
      scratch.right_lines.clear();
      for (int64_t i = 0; i < cols; ++i) scratch.right_lines.push_back(here + i * stride_bytes);
      for (int64_t k = 0; k == 0 || k < inner; k += rest_depth) {
        kernels.dot(rest + k / kernels.elements_per_unit * unit, rows.rest_stride, rows.rest,
                    scratch.right_lines.data(), cols, k, std::min(rest_depth, inner - k),
                    sums + rows.turned * kTurnedStride * unit, kTurnedStride, k == 0, {});
      }
    }
    for (int64_t panel = 0; panel < cols; panel += kernels.panel_cols) {
      char* sums = scratch.sums + panel * unit;
      finish({tile.row, tile.rows, tile.col + col + panel, std::min(kernels.panel_cols, cols - panel), sums,
              product.pair ? sums + kPairAt * unit : nullptr, kTurnedStride});
    }
  }
}

// Few enough rows that packing the weights would cost more than it saves.
void multiply_in_place(const Product& product, const Tile& tile, const GemmKernels& kernels, Way way,
                       const std::function<void(const TileSums&)>& finish, Scratch& scratch) {
  const int64_t element = kernels.element_bytes, inner = product.left.cols;
  const Panels panels = {tile.col, tile.cols, product.pair, kernels.panel_cols};
  const bool dot = way == Way::kDot;
  const int64_t stride = dot ? dot_cols(product.left.rows) + 2 * kDotRoom : kSweepStride;
  const int64_t halves = product.pair ? 2 : 1;
  // Sums lie as [rows][stride], a pair's second half behind the first.
  const int64_t pair_at = divide_up(tile.cols, panels.width) * panels.width + (dot ? kDotRoom : 0);
  const auto sums_at = [&](int64_t col) { return scratch.sums + col * kernels.unit_bytes; };
  scratch.left_lines.clear(), scratch.right_lines.clear();
  add_lines(product.left, tile.row, tile.rows, element, scratch.left_lines);
  if (dot) {
    for (int64_t half = 0; half < halves; ++half) {
      add_lines(product.right, tile.col + half * product.pair, tile.cols, element, scratch.right_lines);
    }
    const char* const* cols = scratch.right_lines.data();
    const int64_t depth = dot_depth(product.left.rows, inner, kernels);
    const int64_t row_stride = depth / kernels.elements_per_unit + kDotRowsRoom;
    char* rows = scratch.left;
    for (int64_t k = 0; k == 0 || k < inner; k += depth) {
      const int64_t count = std::min(depth, inner - k);
      kernels.pack_left_inner(rows, row_stride, scratch.left_lines.data(), tile.rows, k, count);
      for (int64_t half = 0; half < halves; ++half) {
        Fetch after;
        if (half + 1 < halves) {
          after = {cols + tile.cols, tile.cols, k * element, count * element};
        } else if (k + depth < inner) {
          after = {cols, tile.cols, (k + depth) * element, std::min(depth, inner - k - depth) * element};
        }
        kernels.dot(rows, row_stride, tile.rows, cols + half * tile.cols, tile.cols, k, count, sums_at(half * pair_at),
                    stride, k == 0, after);
      }
    }
  } else {
    const int64_t step = kDepth * kernels.elements_per_unit;
    // Halves that lie side by side are swept as one.
    const int64_t sweeps = pair_at == product.pair ? 1 : halves, sweep_cols = tile.cols * (halves / sweeps);
    add_lines(product.right, 0, inner, element, scratch.right_lines);
    for (int64_t k = 0; k == 0 || k < inner; k += step) {
      const int64_t count = std::min(step, inner - k);
      kernels.pack_left_inner(scratch.left, kLeftStride, scratch.left_lines.data(), tile.rows, k, count);
      for (int64_t half = 0; half < sweeps; ++half) {
        Fetch after;
        const auto read_next = [&](int64_t from, int64_t lines, int64_t first_col) {
          after = {scratch.right_lines.data() + from, lines, first_col * element, sweep_cols * element};
        };
        if (half + 1 < sweeps) {
          read_next(k, count, tile.col + product.pair);
        } else if (k + step < inner) {
          read_next(k + step, std::min(step, inner - k - step), tile.col);
        }
        kernels.axpy(scratch.left, tile.rows, scratch.right_lines.data() + k, count, tile.col + half * product.pair,
                     sweep_cols, sums_at(half * pair_at), stride, k == 0, after);
      }
    }
  }
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    if (!panels.completes(panel)) continue;
    const int64_t col = panels.col(panel);
    finish({tile.row, tile.rows, tile.col + col, panels.cols(panel), sums_at(col),
            product.pair ? sums_at(pair_at + col) : nullptr, stride});
  }
}

void multiply_tile(const Product& product, const Tile& tile, const GemmKernels& kernels,
                   const std::function<void(const TileSums&)>& finish, const Output* output) {
  thread_local Scratch scratch;
  const Way way = choose_way(product, kernels);
  switch (way) {
    case Way::kPacked: return multiply_packed(product, tile, kernels, finish, output, scratch);
    case Way::kTurned: return multiply_turned(product, tile, kernels, finish, scratch);
    default: return multiply_in_place(product, tile, kernels, way, finish, scratch);
  }
}

}  // namespace

void multiply_tile(const Product& product, const Tile& tile, const GemmKernels& kernels,
                   const std::function<void(const TileSums&)>& finish) {
  multiply_tile(product, tile, kernels, finish, nullptr);
}

void multiply_tile(const Product& product, const Tile& tile, const GemmKernels& kernels, const Output& output) {
  const int64_t stride = product.right.cols * kernels.output_bytes;
  const auto finish = [&](const TileSums& sums) {
    kernels.finish(sums.sums, sums.stride, sums.rows, sums.cols,
                   output.bias ? output.bias + sums.col * kernels.element_bytes : nullptr,
                   output.data + sums.row * stride + sums.col * kernels.output_bytes, stride);
  };
  multiply_tile(product, tile, kernels, finish, &output);
  if (output.stream) fence_streamed_stores();
}

TileGrid::TileGrid(const Product& product, int64_t num_products, const GemmKernels& kernels)
    : rows_(product.left.rows), cols_(product.pair ? product.pair : product.right.cols), row_tiles_(0), col_tiles_(0) {
  const int64_t rows = rows_, cols = cols_;
  if (rows == 0 || cols == 0) return;
  // Lines that are swept from end to end are best long; a left block, which every tile packs, is best used for as many
  // columns as there is room for sums, of which a product over one block of the inner dimension needs none.
  const Way way = choose_way(product, kernels);
  const bool swept = way == Way::kAxpy;
  int64_t wider = 1;
  if (way == Way::kPacked && rows <= kTileRows / 2) wider = rows * kernels.unit_bytes <= kWideRowsBytes ? 4 : 2;
  const bool stays = way == Way::kPacked && left_stays(product, std::min(rows, kTileRows), kernels);
  if (stays || way == Way::kTurned) wider = 8;
  if (way == Way::kDot) wider = dot_cols(rows) / kTileCols;
  const int64_t largest_cols = swept ? kSweepCols : wider * kTileCols;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shortest_sweep = kShortestSweep / kernels.element_bytes;
  int64_t tile_rows = kTileRows, tile_cols = largest_cols / (product.pair ? 2 : 1);
  const auto enough = [&] {
    const int64_t per_thread = swept && tile_cols / 2 < shortest_sweep ? 1 : kTilesPerThread;
    return divide_up(rows, tile_rows) * divide_up(cols, tile_cols) * num_products >= per_thread * threads;
  };
  while (!enough() && tile_cols > kSmallestTile) {
    tile_cols /= 2;
    if (!enough() && tile_rows > kSmallestTile && way != Way::kTurned) tile_rows /= 2;
  }
  // Equal tiles: 300 rows are 150 and 150, not 256 and 44.
  tile_rows_ = divide_up(rows, divide_up(rows, tile_rows));
  tile_cols_ = divide_up(divide_up(cols, divide_up(cols, tile_cols)), kernels.panel_cols) * kernels.panel_cols;
  row_tiles_ = divide_up(rows, tile_rows_);
  col_tiles_ = divide_up(cols, tile_cols_);
}

Tile TileGrid::tile(int64_t index) const {
  const int64_t row = index / col_tiles_ * tile_rows_, col = index % col_tiles_ * tile_cols_;
  return {row, std::min(tile_rows_, rows_ - row), col, std::min(tile_cols_, cols_ - col)};
}

}  // namespace moe_ext::cpu
