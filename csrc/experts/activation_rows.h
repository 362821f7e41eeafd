// Activations over one row on the CPU: loops with compile-time strides that vectorise.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/cpu_parallel.h"
#include "../common/dtypes.h"
#include "activation.h"

namespace moe_ext::cpu {

// Where column c of gate and of up lies in a gated row of 2 * width: gate[c * stride], up[c * stride].
template <typename T, int stride>
struct GateUp {
  T* gate;
  T* up;
  GateUp(T* row, int64_t width) : gate(row), up(stride == 2 ? row + 1 : row + width) {}
};

// output [width] = activation(row)
template <Activation kind, int stride, typename scalar_t>
MOE_CPU_CLONES void activate_row(const scalar_t* row, scalar_t* output, int64_t width, accumulate_t<scalar_t> alpha,
                                 accumulate_t<scalar_t> limit) {
  using acc_t = accumulate_t<scalar_t>;
  if constexpr (is_gated(kind)) {
    const GateUp<const scalar_t, stride> source(row, width);
    for (int64_t c = 0; c < width; ++c) {
      const acc_t gate = static_cast<acc_t>(source.gate[c * stride]), up = static_cast<acc_t>(source.up[c * stride]);
      output[c] = static_cast<scalar_t>(gated_function<kind>(gate, up, alpha, limit).value);
    }
  } else {
    for (int64_t c = 0; c < width; ++c) {
      output[c] = static_cast<scalar_t>(scalar_function<kind>(static_cast<acc_t>(row[c])).value);
    }
  }
}

// Columns at a time in the backward: buffers that stay in L1 between loops simple enough to vectorise.
constexpr int64_t kColumnBlock = 256;

// gate and up of `columns` columns in, their gradients for the gradient weight * gradient of the output out.
template <Activation kind, int stride, typename scalar_t, typename acc_t>
MOE_HOST_DEVICE_INLINE void differentiate_block(const scalar_t* __restrict gate, const scalar_t* __restrict up,
                                                const scalar_t* __restrict gradient, scalar_t* __restrict grad_gate,
                                                scalar_t* __restrict grad_up, acc_t* __restrict value, int64_t columns,
                                                acc_t weight, acc_t alpha, acc_t limit) {
  for (int64_t c = 0; c < columns; ++c) {
    const acc_t scaled = weight * static_cast<acc_t>(gradient[c]);
    if constexpr (is_gated(kind)) {
      const Gated<acc_t> f =
          gated_function<kind>(static_cast<acc_t>(gate[c * stride]), static_cast<acc_t>(up[c * stride]), alpha, limit);
      grad_gate[c * stride] = static_cast<scalar_t>(scaled * f.gate_derivative);
      grad_up[c * stride] = static_cast<scalar_t>(scaled * f.up_derivative);
      value[c] = f.value;
    } else {
      const ValueAndDerivative<acc_t> f = scalar_function<kind>(static_cast<acc_t>(gate[c]));
      grad_gate[c] = static_cast<scalar_t>(scaled * f.derivative);
      value[c] = f.value;
    }
  }
}

// grad_row = weight * gradient * activation'(row). If kScaled, `gradient` [width] is overwritten with
// weight * activation(row), and the result is <gradient, activation(row)>; else the result is 0.
template <Activation kind, int stride, bool kScaled, typename scalar_t>
MOE_CPU_CLONES accumulate_t<scalar_t> activate_row_backward(
    const scalar_t* row, std::conditional_t<kScaled, scalar_t, const scalar_t>* gradient, scalar_t* grad_row,
    int64_t width, accumulate_t<scalar_t> weight, accumulate_t<scalar_t> alpha, accumulate_t<scalar_t> limit) {
  using acc_t = accumulate_t<scalar_t>;
  const GateUp<const scalar_t, stride> source(row, width);
  const GateUp<scalar_t, stride> destination(grad_row, width);
  // Independent partial sums: vectorisable, and the same order for any number of threads.
  constexpr int kLanes = 16;
  acc_t partial[kLanes] = {};
  acc_t value[kColumnBlock];
  for (int64_t first = 0; first < width; first += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, width - first);
    differentiate_block<kind, stride>(source.gate + first * stride, source.up + first * stride, gradient + first,
                                      destination.gate + first * stride, destination.up + first * stride, value,
                                      columns, weight, alpha, limit);
    if constexpr (kScaled) {
      auto* block = gradient + first;
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          partial[lane] += static_cast<acc_t>(block[c + lane]) * value[c + lane];
        }
      }
      for (int lane = 0; c < columns; ++c, ++lane) partial[lane] += static_cast<acc_t>(block[c]) * value[c];
      for (c = 0; c < columns; ++c) block[c] = static_cast<scalar_t>(weight * value[c]);
    }
  }
  acc_t dot = 0;
  for (int lane = 0; lane < kLanes; ++lane) dot += partial[lane];
  return dot;
}

// body(ActivationTag<kind>{}, std::integral_constant<int, stride>{}): plain activations know no stride.
template <typename Body>
void dispatch_activation_rows(const ActivationSpec& spec, Body&& body) {
  dispatch_activation(spec.kind, [&](auto kind) {
    if constexpr (is_gated(kind.value)) {
      if (spec.interleaved) return body(kind, std::integral_constant<int, 2>{});
    }
    body(kind, std::integral_constant<int, 1>{});
  });
}

}  // namespace moe_ext::cpu
