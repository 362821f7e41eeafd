// Activations over one row on the CPU: loops with compile-time strides that vectorise.
#pragma once

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

// grad_row = gradient * activation'(row)
template <Activation kind, int stride, typename scalar_t>
MOE_CPU_CLONES void activate_row_backward(const scalar_t* __restrict row, const scalar_t* __restrict gradient,
                                          scalar_t* __restrict grad_row, int64_t width, accumulate_t<scalar_t> alpha,
                                          accumulate_t<scalar_t> limit) {
  using acc_t = accumulate_t<scalar_t>;
  const GateUp<const scalar_t, stride> source(row, width);
  const GateUp<scalar_t, stride> destination(grad_row, width);
  for (int64_t c = 0; c < width; ++c) {
    const auto grad = static_cast<acc_t>(gradient[c]), gate = static_cast<acc_t>(source.gate[c * stride]);
    if constexpr (is_gated(kind)) {
      const Gated<acc_t> f = gated_function<kind>(gate, static_cast<acc_t>(source.up[c * stride]), alpha, limit);
      destination.gate[c * stride] = static_cast<scalar_t>(grad * f.gate_derivative);
      destination.up[c * stride] = static_cast<scalar_t>(grad * f.up_derivative);
    } else {
      destination.gate[c] = static_cast<scalar_t>(grad * scalar_function<kind>(gate).derivative);
    }
  }
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
