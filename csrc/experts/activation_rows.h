// Activations over one row on the CPU: loops with compile-time strides that vectorise.
#pragma once

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
void activate_row(const scalar_t* row, scalar_t* output, int64_t width, accumulate_t<scalar_t> alpha,
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

// grad_row = weight * gradient * activation'(row). If kScaled, `gradient` [width] is overwritten with
// weight * activation(row), and the result is <gradient, activation(row)>; else the result is 0.
template <Activation kind, int stride, bool kScaled, typename scalar_t>
accumulate_t<scalar_t> activate_row_backward(const scalar_t* row, std::conditional_t<kScaled, scalar_t, const scalar_t>* gradient,
                                             scalar_t* grad_row, int64_t width, accumulate_t<scalar_t> weight,
                                             accumulate_t<scalar_t> alpha, accumulate_t<scalar_t> limit) {
  using acc_t = accumulate_t<scalar_t>;
  // Independent partial sums: vectorisable, and the same order for any number of threads.
  constexpr int kLanes = 16;
  acc_t partial[kLanes] = {};
  const auto column = [&](int64_t c, int lane) {
    const acc_t grad = static_cast<acc_t>(gradient[c]);
    acc_t value;
    if constexpr (is_gated(kind)) {
      const GateUp<const scalar_t, stride> source(row, width);
      const GateUp<scalar_t, stride> destination(grad_row, width);
      const Gated<acc_t> f = gated_function<kind>(static_cast<acc_t>(source.gate[c * stride]),
                                                  static_cast<acc_t>(source.up[c * stride]), alpha, limit);
      destination.gate[c * stride] = static_cast<scalar_t>(weight * grad * f.gate_derivative);
      destination.up[c * stride] = static_cast<scalar_t>(weight * grad * f.up_derivative);
      value = f.value;
    } else {
      const ValueAndDerivative<acc_t> f = scalar_function<kind>(static_cast<acc_t>(row[c]));
      grad_row[c] = static_cast<scalar_t>(weight * grad * f.derivative);
      value = f.value;
    }
    if constexpr (kScaled) {
      gradient[c] = static_cast<scalar_t>(weight * value);
      partial[lane] += grad * value;
    }
  };
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) column(c + lane, lane);
  }
  for (int lane = 0; c < width; ++c, ++lane) column(c, lane);
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
