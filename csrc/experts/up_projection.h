// The up projection of one expert on the CPU: product, bias and activation, tile by tile. The pre-activation leaves the
// tile only where it is to be kept.
#pragma once

#include "../grouped_gemm/cpu/multiply_tile.h"
#include "activation_blocks.h"

namespace moe_ext::cpu {

// What all experts of a call share.
struct UpProjection {
  const GemmKernels& kernels;
  ActivationSpec activation;
  int64_t width;  // of the pre-activation
  ActivationBlocks blocks;

  UpProjection(ScalarType dtype, const ActivationSpec& spec, int64_t columns)
      : kernels(choose_kernels(dtype, dtype)),
        activation(spec),
        width(columns),
        blocks(activation_blocks(spec, dtype == ScalarType::Double)) {}

  int64_t pair() const { return activation.gated() && !activation.interleaved ? width / 2 : 0; }

  Product product(const Matrix& tokens, const Matrix& factor) const { return {tokens, factor, pair()}; }

  // All pointers are to the first row of the expert; bias and pre_activation may be null.
  void run(const Product& up_product, const char* bias, char* pre_activation, char* activated, const Tile& tile) const {
    const bool is_double = kernels.unit_bytes == sizeof(double);
    const int64_t element = kernels.element_bytes;
    thread_local double buffer[kTileRows * kMaxPanelCols];
    multiply_tile(up_product, tile, kernels, [&](const TileSums& sums) {
      for (char* half : {sums.sums, sums.pair}) {
        if (!half) continue;
        const int64_t col = sums.col + (half == sums.pair ? pair() : 0);
        if (bias) {
          double added[kMaxPanelCols];
          kernels.widen(bias + col * element, 0, 1, sums.cols, added, 0);
          add_to_rows(half, sums.stride, sums.rows, sums.cols, added, is_double);
        }
        if (pre_activation) {
          kernels.finish(half, sums.stride, sums.rows, sums.cols, nullptr,
                         pre_activation + (sums.row * width + col) * element, width * element);
        }
      }
      const bool interleaved = activation.gated() && !sums.pair;
      const int64_t halves = interleaved ? 2 : 1, cols = sums.cols / halves;
      const char* up = interleaved ? sums.sums + kernels.unit_bytes : sums.pair;
      blocks.activate(sums.sums, up, sums.stride, buffer, kMaxPanelCols, sums.rows, cols, activation);
      const int64_t output_width = activation.output_width(width), col = sums.col / halves;
      kernels.finish(buffer, kMaxPanelCols, sums.rows, cols, nullptr,
                     activated + (sums.row * output_width + col) * element, output_width * element);
    });
  }
};

}  // namespace moe_ext::cpu
