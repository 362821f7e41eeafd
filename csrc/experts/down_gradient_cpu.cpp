#include "down_gradient.h"

#include <algorithm>

namespace moe_ext::cpu {
namespace {

// Room for a block of rows, of their pre-activation (gate and up) and of what belongs to a row.
struct Buffers {
  double pre_activation[kTileRows * 2 * kMaxPanelCols];
  double weights[kTileRows];
  bool held[kTileRows];
};

template <typename acc_t>
void load_weights(const DownGradient::Rows& rows, const Gather& gather, const Tile& tile, Buffers& buffers) {
  auto* weights = reinterpret_cast<acc_t*>(buffers.weights);
  for (int64_t row = 0; row < tile.rows; ++row) {
    buffers.held[row] = gather.holds(tile.row + row);
    const auto* given = reinterpret_cast<const acc_t*>(rows.topk_weights);
    weights[row] = !buffers.held[row] ? acc_t(0) : given ? given[rows.slots[tile.row + row]] : acc_t(1);
  }
}

template <typename acc_t>
void sum_dots_of(const GemmKernels& kernels, const DownGradient::Rows& rows, const Gather& gather, int64_t num_rows,
                 const char* grad_output, const char* bias, int64_t hidden_size, acc_t* grad_topk_weights) {
  constexpr int64_t kBlock = 256;
  acc_t gradients[kBlock], biases[kBlock];
  for (int64_t row = 0; row < num_rows; ++row) {
    if (!gather.holds(row)) continue;
    const double* dots = rows.dots + row * rows.panels;
    double sum = 0;
    for (int64_t panel = 0; panel < rows.panels; ++panel) sum += dots[panel];
    const char* gradient = grad_output + rows.slots[row] / rows.maps.topk * hidden_size * kernels.element_bytes;
    for (int64_t first = 0; bias && first < hidden_size; first += kBlock) {
      const int64_t count = std::min(kBlock, hidden_size - first);
      kernels.widen(gradient + first * kernels.element_bytes, 0, 1, count, gradients, 0);
      kernels.widen(bias + first * kernels.element_bytes, 0, 1, count, biases, 0);
      for (int64_t c = 0; c < count; ++c) sum += static_cast<double>(gradients[c]) * biases[c];
    }
    grad_topk_weights[rows.slots[row]] = static_cast<acc_t>(sum);
  }
}

}  // namespace

void DownGradient::run(const Product& product, const Rows& rows, const Tile& tile) const {
  thread_local Buffers buffers;
  const int64_t element = kernels_.element_bytes, unit = kernels_.unit_bytes;
  const bool gated = activation_.gated(), interleaved = gated && activation_.interleaved;
  if (is_double_) {
    load_weights<double>(rows, product.left.gather, tile, buffers);
  } else {
    load_weights<float>(rows, product.left.gather, tile, buffers);
  }
  multiply_tile(product, tile, kernels_, [&](const TileSums& sums) {
    constexpr int64_t kStride = 2 * kMaxPanelCols;
    auto* block = reinterpret_cast<char*>(buffers.pre_activation);
    const int64_t first = sums.col, stride = width_ * element;
    // Where the panel's pre-activation lies: one piece, or gate and up apart.
    struct Piece {
      int64_t col, cols;
      char* block;
    };
    const Piece pieces[] = {{interleaved ? 2 * first : first, interleaved ? 2 * sums.cols : sums.cols, block},
                            {width_ / 2 + first, sums.cols, block + kMaxPanelCols * unit}};
    const int num_pieces = gated && !interleaved ? 2 : 1;
    for (int i = 0; i < num_pieces; ++i) {
      kernels_.widen(rows.pre_activation + sums.row * stride + pieces[i].col * element, stride, sums.rows,
                     pieces[i].cols, pieces[i].block, kStride);
    }
    blocks_.differentiate(block, interleaved ? block + unit : pieces[1].block, kStride, sums.sums, sums.stride,
                          sums.rows, sums.cols,
                          reinterpret_cast<const char*>(buffers.weights) + (sums.row - tile.row) * unit,
                          buffers.held + (sums.row - tile.row),
                          rows.dots + sums.row * rows.panels + first / kernels_.panel_cols, rows.panels, activation_);
    for (int i = 0; i < num_pieces; ++i) {
      kernels_.finish(pieces[i].block, kStride, sums.rows, pieces[i].cols, nullptr,
                      rows.grad_pre_activation + sums.row * stride + pieces[i].col * element, stride);
    }
    const int64_t output_stride = activation_.output_width(width_) * element;
    kernels_.finish(sums.sums, sums.stride, sums.rows, sums.cols, nullptr,
                    rows.activated + sums.row * output_stride + first * element, output_stride);
  });
}

void DownGradient::sum_dots(const Rows& rows, int64_t num_rows, const char* grad_output, const char* bias,
                            int64_t hidden_size, char* grad_topk_weights) const {
  const Gather gather = {rows.slots, rows.maps.topk, rows.maps.num_slots};
  if (is_double_) {
    sum_dots_of(kernels_, rows, gather, num_rows, grad_output, bias, hidden_size,
                reinterpret_cast<double*>(grad_topk_weights));
  } else {
    sum_dots_of(kernels_, rows, gather, num_rows, grad_output, bias, hidden_size,
                reinterpret_cast<float*>(grad_topk_weights));
  }
}

void DownGradient::sum_rows(const char* rows, int64_t num_rows, int64_t cols, char* output) const {
  constexpr int64_t kBlock = 256;
  double sums[kBlock], values[kBlock];
  const int64_t element = kernels_.element_bytes;
  for (int64_t first = 0; first < cols; first += kBlock) {
    const int64_t count = std::min(kBlock, cols - first);
    std::fill_n(sums, kBlock, 0.0);  // the same bits for floats
    for (int64_t row = 0; row < num_rows; ++row) {
      kernels_.widen(rows + (row * cols + first) * element, 0, 1, count, values, 0);
      add_to_rows(sums, 0, 1, count, values, is_double_);
    }
    kernels_.finish(sums, 0, 1, count, nullptr, output + first * element, 0);
  }
}

}  // namespace moe_ext::cpu
