#include "tiled_gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/gemm_kernels.h"

namespace moe_ext::cpu {
namespace {

// A tile of this many rows and columns: accumulators, the packed left block and a right panel share a core's L2.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileCols = 256;
// Tiles are narrowed down to this while there are fewer than kWantedTiles: a small problem feeds many cores as well.
constexpr int64_t kSmallestTile = 64;
constexpr int64_t kWantedTiles = 64;
// Outputs larger than the caches are written past them.
constexpr int64_t kStreamedBytes = 64 << 20;
constexpr int64_t kCacheLine = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Tile {
  size_t problem;
  int64_t row, rows;
  int64_t col, cols;
};

std::vector<Tile> cut_into_tiles(const std::vector<GemmProblem>& problems, int64_t panel_cols) {
  int64_t largest_rows = kTileRows, largest_cols = kTileCols;
  const auto count = [&] {
    int64_t tiles = 0;
    for (const GemmProblem& p : problems) tiles += divide_up(p.left.rows, largest_rows) * divide_up(p.right.cols, largest_cols);
    return tiles;
  };
  while (count() < kWantedTiles && largest_cols > kSmallestTile) {
    largest_cols /= 2;
    if (count() < kWantedTiles) largest_rows /= 2;
  }
  std::vector<Tile> tiles;
  for (size_t index = 0; index < problems.size(); ++index) {
    const int64_t num_rows = problems[index].left.rows, num_cols = problems[index].right.cols;
    if (num_rows == 0 || num_cols == 0) continue;
    // Equal tiles: 300 rows are 150 and 150, not 256 and 44.
    const int64_t rows = divide_up(num_rows, divide_up(num_rows, largest_rows));
    const int64_t cols = divide_up(divide_up(num_cols, divide_up(num_cols, largest_cols)), panel_cols) * panel_cols;
    for (int64_t row = 0; row < num_rows; row += rows) {
      for (int64_t col = 0; col < num_cols; col += cols) {
        tiles.push_back({index, row, std::min(rows, num_rows - row), col, std::min(cols, num_cols - col)});
      }
    }
  }
  const auto cost = [&](const Tile& tile) { return tile.rows * tile.cols * problems[tile.problem].left.cols; };
  std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return cost(a) > cost(b); });
  return tiles;
}

// What one thread works in; kept from call to call.
struct Scratch {
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, &std::free};
  char *left, *right, *sums;
  std::vector<const char*> left_lines, right_lines, wanted;

  Scratch() {
    constexpr int64_t kUnit = sizeof(double);
    // Packing writes whole vectors, so a block may be a vector's worth of rows larger than the tile.
    constexpr int64_t kLeft = (kTileRows + 16) * kLeftStride * kUnit, kRight = (kDepth + 16) * kMaxPanelCols * kUnit;
    constexpr int64_t kSums = kTileRows * kTileCols * kUnit;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, (kLeft + kRight + kSums + 4095) / 4096 * 4096)));
    MOE_CHECK(memory, "grouped_gemm: out of memory for the scratch space of a thread");
    left = memory.get(), right = left + kLeft, sums = right + kRight;
  }
};

// Pointers to the start of rows (or columns) [first, first + count) of `matrix`, whose elements are adjacent.
void find_lines(const Matrix& matrix, bool rows, int64_t first, int64_t count, int64_t element_bytes,
                std::vector<const char*>& lines) {
  const int64_t stride = (rows ? matrix.row_stride : matrix.col_stride) * element_bytes;
  const Gather& gather = matrix.gather;
  lines.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = gather.slots ? gather.slots[first + i] : 0;
    const bool held = !gather.slots || (slot >= 0 && slot < gather.num_slots);
    lines[i] = held ? matrix.data + (gather.slots ? slot / gather.topk : first + i) * stride : nullptr;
  }
}

// Every cache line of elements [first, first + count) of `lines`.
void want(const char* const* lines, int64_t num_lines, int64_t first_byte, int64_t bytes,
          std::vector<const char*>& wanted) {
  for (int64_t i = 0; i < num_lines; ++i) {
    for (int64_t byte = 0; lines[i] && byte < bytes; byte += kCacheLine) wanted.push_back(lines[i] + first_byte + byte);
  }
}

void multiply_packed(const GemmProblem& problem, const Tile& tile, const GemmKernels& kernels, bool stream,
                     Scratch& scratch) {
  const int64_t element = kernels.element_bytes, inner = problem.left.cols, panel = kernels.panel_cols;
  const bool left_inner = problem.left.col_stride == 1, right_inner = problem.right.row_stride == 1;
  const int64_t step = kDepth * kernels.elements_per_unit;
  const int64_t panel_bytes = tile.rows * panel * kernels.unit_bytes;
  const char* bias = problem.bias ? problem.bias + tile.col * element : nullptr;
  const int64_t output_stride = problem.right.cols * kernels.output_bytes;
  char* output = problem.output + tile.row * output_stride + tile.col * kernels.output_bytes;

  if (left_inner) find_lines(problem.left, true, tile.row, tile.rows, element, scratch.left_lines);
  if (right_inner) find_lines(problem.right, false, tile.col, tile.cols, element, scratch.right_lines);
  // At least one block, so that a product over nothing still writes its zeros.
  for (int64_t k = 0; k == 0 || k < inner; k += step) {
    const int64_t count = std::min(step, inner - k), depth = divide_up(count, kernels.elements_per_unit);
    const bool last = k + step >= inner;
    if (left_inner) {
      kernels.pack_left_inner(scratch.left, scratch.left_lines.data(), tile.rows, k, count);
    } else {
      find_lines(problem.left, false, k, count, element, scratch.left_lines);
      kernels.pack_left_outer(scratch.left, scratch.left_lines.data(), count, tile.row, tile.rows);
    }
    if (!right_inner) find_lines(problem.right, true, k, count, element, scratch.right_lines);
    for (int64_t col = 0; col < tile.cols; col += panel) {
      const int64_t cols = std::min(panel, tile.cols - col), next = col + panel;
      scratch.wanted.clear();
      if (right_inner) {
        const char* const* lines = scratch.right_lines.data();
        kernels.pack_right_inner(scratch.right, lines + col, cols, k, count);
        // The next panel of this block; after the last, the first of the next block.
        if (next < tile.cols) {
          want(lines + next, std::min(panel, tile.cols - next), k * element, count * element, scratch.wanted);
        } else if (!last) {
          want(lines, std::min(panel, tile.cols), (k + step) * element, std::min(step, inner - k - step) * element,
               scratch.wanted);
        }
      } else {
        kernels.pack_right_outer(scratch.right, scratch.right_lines.data(), count, tile.col + col, cols);
        if (next < tile.cols) {
          want(scratch.right_lines.data(), count, (tile.col + next) * element,
               std::min(panel, tile.cols - next) * element, scratch.wanted);
        }
      }
      // One block needs no sums but those of the panel at hand.
      char* sums = scratch.sums + (inner > step ? col / panel * panel_bytes : 0);
      kernels.multiply(scratch.left, scratch.right, tile.rows, depth, sums, k == 0, scratch.wanted.data(),
                       static_cast<int64_t>(scratch.wanted.size()));
      if (last) {
        kernels.finish(sums, panel, tile.rows, cols, bias ? bias + col * element : nullptr,
                       output + col * kernels.output_bytes, output_stride, stream);
      }
    }
  }
}

// A few rows, both factors running along the inner dimension.
void multiply_few_rows(const GemmProblem& problem, const Tile& tile, const GemmKernels& kernels, Scratch& scratch) {
  const int64_t element = kernels.element_bytes;
  find_lines(problem.left, true, tile.row, tile.rows, element, scratch.left_lines);
  find_lines(problem.right, false, tile.col, tile.cols, element, scratch.right_lines);
  const int64_t output_stride = problem.right.cols * kernels.output_bytes;
  char* output = problem.output + tile.row * output_stride + tile.col * kernels.output_bytes;
  // A row of zeros has no memory: any other row takes its place, and its sums are cleared.
  const std::vector<const char*> given = scratch.left_lines;
  std::replace(scratch.left_lines.begin(), scratch.left_lines.end(), static_cast<const char*>(nullptr),
               scratch.right_lines.front());
  kernels.dot(scratch.left_lines.data(), tile.rows, scratch.right_lines.data(), tile.cols, problem.left.cols,
              scratch.sums, kTileCols);
  for (int64_t row = 0; row < tile.rows; ++row) {
    if (!given[row]) std::memset(scratch.sums + row * kTileCols * kernels.unit_bytes, 0, tile.cols * kernels.unit_bytes);
  }
  kernels.finish(scratch.sums, kTileCols, tile.rows, tile.cols,
                 problem.bias ? problem.bias + tile.col * element : nullptr, output, output_stride, false);
}

void run_tile(const GemmProblem& problem, const Tile& tile, const GemmKernels& kernels, bool stream) {
  thread_local Scratch scratch;
  const bool runs_inner = problem.left.col_stride == 1 && problem.right.row_stride == 1;
  if (runs_inner && tile.rows <= kMaxDotRows) {
    multiply_few_rows(problem, tile, kernels, scratch);
  } else {
    multiply_packed(problem, tile, kernels, stream, scratch);
  }
}

const GemmKernels& choose_kernels(ScalarType dtype, ScalarType output_dtype) {
  const GemmType type = dtype == ScalarType::Double     ? GemmType::kFloat64
                        : dtype == ScalarType::BFloat16 ? GemmType::kBFloat16
                        : dtype == ScalarType::Half     ? GemmType::kFloat16
                                                        : GemmType::kFloat32;
  const bool wide = dtype != output_dtype;
#if defined(__x86_64__)
  static const auto kernels_of = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("x86-64-v3")) return &portable::gemm_kernels;
    if (!__builtin_cpu_supports("x86-64-v4")) return &avx2::gemm_kernels;
    return __builtin_cpu_supports("avx512bf16") ? &avx512_bf16::gemm_kernels : &avx512::gemm_kernels;
  }();
  return kernels_of(type, wide);
#else
  return portable::gemm_kernels(type, wide);
#endif
}

}  // namespace

void tiled_gemm(const std::vector<GemmProblem>& problems, ScalarType dtype, ScalarType output_dtype) {
  const GemmKernels& kernels = choose_kernels(dtype, output_dtype);
  const std::vector<Tile> tiles = cut_into_tiles(problems, kernels.panel_cols);
  int64_t output_bytes = 0;
  for (const GemmProblem& p : problems) output_bytes += p.left.rows * p.right.cols * kernels.output_bytes;
  const bool stream = output_bytes > kStreamedBytes;

  std::atomic<size_t> next = 0;
  const auto take_tiles = [&](int64_t, int64_t) {
    for (size_t index = next++; index < tiles.size(); index = next++) {
      run_tile(problems[tiles[index].problem], tiles[index], kernels, stream);
    }
  };
  const auto workers = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tiles.size()));
  if (workers > 0) torch::stable::parallel_for(0, workers, 1, take_tiles);
}

}  // namespace moe_ext::cpu
