#include "activation_blocks.h"

#include <algorithm>

#include "../grouped_gemm/cpu/gemm_kernels.h"
#include "activation_rows.h"

namespace moe_ext::cpu {
namespace {

template <Activation kind, int step, typename acc_t>
MOE_CPU_CLONES void activate_block(const void* gate_block, const void* up_block, int64_t stride, void* output_block,
                                   int64_t output_stride, int64_t rows, int64_t cols, const ActivationSpec& spec) {
  const auto alpha = static_cast<acc_t>(spec.alpha), limit = static_cast<acc_t>(spec.limit);
  for (int64_t row = 0; row < rows; ++row) {
    const acc_t* __restrict gate = static_cast<const acc_t*>(gate_block) + row * stride;
    const acc_t* __restrict up = static_cast<const acc_t*>(up_block) + row * stride;
    acc_t* __restrict output = static_cast<acc_t*>(output_block) + row * output_stride;
    for (int64_t c = 0; c < cols; ++c) {
      if constexpr (is_gated(kind)) {
        output[c] = gated_function<kind>(gate[c * step], up[c * step], alpha, limit).value;
      } else {
        output[c] = scalar_function<kind>(gate[c]).value;
      }
    }
  }
}

template <Activation kind, int step, typename acc_t>
MOE_CPU_CLONES void differentiate_block_rows(void* gate_block, void* up_block, int64_t stride, void* gradient_block,
                                             int64_t gradient_stride, int64_t rows, int64_t cols, const void* weights,
                                             const bool* held, double* dots, int64_t dots_stride,
                                             const ActivationSpec& spec) {
  const auto alpha = static_cast<acc_t>(spec.alpha), limit = static_cast<acc_t>(spec.limit);
  constexpr int kLanes = 8;
  acc_t products[kMaxPanelCols];
  for (int64_t row = 0; row < rows; ++row) {
    auto* gate = static_cast<acc_t*>(gate_block) + row * stride;
    auto* up = static_cast<acc_t*>(up_block) + row * stride;
    auto* gradient = static_cast<acc_t*>(gradient_block) + row * gradient_stride;
    double& dot = dots[row * dots_stride];
    if (!held[row]) {
      for (int64_t c = 0; c < cols; ++c) {
        gate[c * step] = 0;
        if constexpr (is_gated(kind)) up[c * step] = 0;
        gradient[c] = 0;
      }
      dot = 0;
      continue;
    }
    const acc_t weight = static_cast<const acc_t*>(weights)[row];
    // In place, but no element of one column is an element of another.
#pragma GCC ivdep
    for (int64_t c = 0; c < cols; ++c) {
      const acc_t scaled = weight * gradient[c];
      acc_t value;
      if constexpr (is_gated(kind)) {
        const Gated<acc_t> f = gated_function<kind>(gate[c * step], up[c * step], alpha, limit);
        gate[c * step] = scaled * f.gate_derivative;
        up[c * step] = scaled * f.up_derivative;
        value = f.value;
      } else {
        const ValueAndDerivative<acc_t> f = scalar_function<kind>(gate[c]);
        gate[c] = scaled * f.derivative;
        value = f.value;
      }
      products[c] = gradient[c] * value;
      gradient[c] = weight * value;
    }
    // Terms of both signs that may cancel: summed in double, in lanes that vectorise.
    double lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(products[c + lane]);
    }
    for (; c < cols; ++c) lanes[0] += static_cast<double>(products[c]);
    dot = (lanes[0] + lanes[1] + lanes[2] + lanes[3]) + (lanes[4] + lanes[5] + lanes[6] + lanes[7]);
  }
}

template <typename acc_t>
MOE_CPU_CLONES void add_to_block(acc_t* sums, int64_t stride, int64_t rows, int64_t cols, const acc_t* values) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < cols; ++c) sums[row * stride + c] += values[c];
  }
}

}  // namespace

ActivationBlocks activation_blocks(const ActivationSpec& spec, bool is_double) {
  ActivationBlocks found = {};
  dispatch_activation_rows(spec, [&](auto kind, auto step) {
    if (is_double) {
      found = {&activate_block<kind.value, step.value, double>,
               &differentiate_block_rows<kind.value, step.value, double>};
    } else {
      found = {&activate_block<kind.value, step.value, float>,
               &differentiate_block_rows<kind.value, step.value, float>};
    }
  });
  return found;
}

void add_to_rows(void* sums, int64_t stride, int64_t rows, int64_t cols, const void* values, bool is_double) {
  if (is_double) {
    add_to_block(static_cast<double*>(sums), stride, rows, cols, static_cast<const double*>(values));
  } else {
    add_to_block(static_cast<float*>(sums), stride, rows, cols, static_cast<const float*>(values));
  }
}

}  // namespace moe_ext::cpu
