#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <mutex>
#include <numeric>

#include "tiled_gemm.h"

namespace moe_ext::cpu {
namespace {

// A tile this large runs at the full speed of one core and its operands stay in the last-level cache.
constexpr int64_t kLargestTile = 512;
// Tiles are halved down to this while there are fewer than kWantedTiles: a small problem feeds many cores as well.
constexpr int64_t kSmallestTile = 64;
constexpr int64_t kWantedTiles = 64;

struct Tile {
  size_t problem;
  int64_t row, rows;
  int64_t col, cols;
};

struct Dtypes {
  ScalarType factors;
  ScalarType output;
  // fp16 has no fast CPU GEMM in torch, and no mm takes 16-bit factors to an fp32 output: such tiles are computed in
  // fp32.
  bool widened() const { return factors == ScalarType::Half || factors != output; }
};

int64_t size_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<Tile> cut_into_tiles(const std::vector<GemmProblem>& problems) {
  int64_t rows = kLargestTile, cols = kLargestTile;
  const auto count = [&] {
    int64_t tiles = 0;
    for (const GemmProblem& p : problems) tiles += divide_up(p.output.rows, rows) * divide_up(p.output.cols, cols);
    return tiles;
  };
  while (count() < kWantedTiles && cols > kSmallestTile) {
    cols /= 2;
    if (count() < kWantedTiles) rows /= 2;
  }
  std::vector<Tile> tiles;
  for (size_t index = 0; index < problems.size(); ++index) {
    const Matrix& output = problems[index].output;
    for (int64_t row = 0; row < output.rows; row += rows) {
      for (int64_t col = 0; col < output.cols; col += cols) {
        tiles.push_back({index, row, std::min(rows, output.rows - row), col, std::min(cols, output.cols - col)});
      }
    }
  }
  const auto cost = [&](const Tile& tile) { return tile.rows * tile.cols * problems[tile.problem].left.cols; };
  std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return cost(a) > cost(b); });
  return tiles;
}

Matrix block(const Matrix& matrix, ScalarType dtype, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const int64_t offset = row * matrix.row_stride + col * matrix.col_stride;
  return {matrix.data + offset * size_of(dtype), rows, cols, matrix.row_stride, matrix.col_stride};
}

Tensor as_tensor(const Matrix& matrix, ScalarType dtype) {
  const std::array<int64_t, 2> sizes = {matrix.rows, matrix.cols};
  const std::array<int64_t, 2> strides = {matrix.row_stride, matrix.col_stride};
  return torch::stable::from_blob(matrix.data, {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

Tensor as_tensor(char* vector, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return torch::stable::from_blob(vector, {&size, 1}, {&stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
}

// out = left @ right + bias
void call_mm(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias, const Tensor& out) {
  if (!bias.has_value()) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                      torch::stable::detail::from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
    return;
  }
  // addmm.out takes Scalars, which the stable ABI cannot pass; linear.out is addmm.out with both at 1.
  std::array<StableIValue, 4> stack{torch::stable::detail::from(left),
                                    torch::stable::detail::from(torch::stable::transpose(right, 0, 1)),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

void run_tile(const GemmProblem& problem, const Tile& tile, const Dtypes& dtypes) {
  const int64_t inner = problem.left.cols;
  Tensor left = as_tensor(block(problem.left, dtypes.factors, tile.row, tile.rows, 0, inner), dtypes.factors);
  Tensor right = as_tensor(block(problem.right, dtypes.factors, 0, inner, tile.col, tile.cols), dtypes.factors);
  std::optional<Tensor> bias;
  if (problem.bias) {
    bias = as_tensor(problem.bias + tile.col * size_of(dtypes.factors), tile.cols, dtypes.factors);
  }
  Tensor out = as_tensor(block(problem.output, dtypes.output, tile.row, tile.rows, tile.col, tile.cols), dtypes.output);
  if (!dtypes.widened()) return call_mm(left, right, bias, out);

  left = torch::stable::to(left, ScalarType::Float);
  right = torch::stable::to(right, ScalarType::Float);
  if (bias) bias = torch::stable::to(*bias, ScalarType::Float);
  if (dtypes.output == ScalarType::Float) return call_mm(left, right, bias, out);
  const Tensor wide = torch::stable::new_empty(left, {tile.rows, tile.cols});
  call_mm(left, right, bias, wide);
  torch::stable::copy_(out, wide);
}

}  // namespace

void tiled_gemm(const std::vector<GemmProblem>& problems, ScalarType dtype, ScalarType output_dtype) {
  const Dtypes dtypes{dtype, output_dtype};
  const std::vector<Tile> tiles = cut_into_tiles(problems);
  if (tiles.empty()) return;

  std::atomic<size_t> next = 0;
  std::mutex error_mutex;
  std::exception_ptr error;
  const auto take_tiles = [&](int64_t, int64_t) {
    try {
      for (size_t index = next++; index < tiles.size(); index = next++) {
        run_tile(problems[tiles[index].problem], tiles[index], dtypes);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      error = std::current_exception();
    }
  };
  // At least two, so that even one tile runs inside a parallel region, where mm stays on its thread.
  const auto workers = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tiles.size()));
  torch::stable::parallel_for(0, std::max<int64_t>(2, workers), 1, take_tiles);
  if (error) std::rethrow_exception(error);
}

}  // namespace moe_ext::cpu
