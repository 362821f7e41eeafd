// Activations on CUDA, one 16-byte vector of outputs at a time.
#pragma once

#include "../common/cuda_launch.h"
#include "activation.h"

namespace moe_ext::cuda {

enum class RowMode { kPlain, kConcatenated, kInterleaved };

inline RowMode row_mode(const ActivationSpec& spec) {
  return !spec.gated() ? RowMode::kPlain : spec.interleaved ? RowMode::kInterleaved : RowMode::kConcatenated;
}

struct DeviceActivation {
  Activation kind;
  float alpha;
  float limit;
};

inline DeviceActivation on_device(const ActivationSpec& spec) {
  return {spec.kind, static_cast<float>(spec.alpha), static_cast<float>(spec.limit)};
}

// `width` columns of a pre-activation in fp32; `up` stays unused for a plain one.
template <int width>
struct GateUpVector {
  float gate[width];
  float up[width];
};

// What one vector of outputs is made from, as it lies in memory: gate and up, or an interleaved stretch in two.
template <RowMode mode, typename scalar_t, int width>
struct PackedGateUp {
  Vector<scalar_t, width> parts[mode == RowMode::kPlain ? 1 : 2];
};

// Vector `column` of a row whose output has `row_vectors` vectors.
template <RowMode mode, typename scalar_t, int width>
__device__ PackedGateUp<mode, scalar_t, width> load_packed(const Vector<scalar_t, width>* row, int64_t column,
                                                           int64_t row_vectors) {
  if constexpr (mode == RowMode::kPlain) {
    return {{row[column]}};
  } else if constexpr (mode == RowMode::kConcatenated) {
    return {{row[column], row[row_vectors + column]}};
  } else {
    return {{row[2 * column], row[2 * column + 1]}};
  }
}

template <RowMode mode, typename scalar_t, int width>
__device__ GateUpVector<width> unpack_gate_up(const PackedGateUp<mode, scalar_t, width>& packed) {
  GateUpVector<width> result;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    if constexpr (mode == RowMode::kInterleaved) {
      result.gate[i] = static_cast<float>(packed.parts[2 * i / width].values[2 * i % width]);
      result.up[i] = static_cast<float>(packed.parts[(2 * i + 1) / width].values[(2 * i + 1) % width]);
    } else {
      result.gate[i] = static_cast<float>(packed.parts[0].values[i]);
      if constexpr (mode == RowMode::kConcatenated) result.up[i] = static_cast<float>(packed.parts[1].values[i]);
    }
  }
  return result;
}

template <RowMode mode, typename scalar_t, int width>
__device__ GateUpVector<width> load_gate_up(const Vector<scalar_t, width>* row, int64_t column, int64_t row_vectors) {
  return unpack_gate_up(load_packed<mode>(row, column, row_vectors));
}

template <RowMode mode, typename scalar_t, int width>
__device__ void store_gate_up(Vector<scalar_t, width>* row, int64_t column, int64_t row_vectors,
                              const GateUpVector<width>& values) {
  if constexpr (mode == RowMode::kInterleaved) {
    Vector<scalar_t, width> pair[2];
#pragma unroll
    for (int i = 0; i < width; ++i) {
      pair[2 * i / width].values[2 * i % width] = static_cast<scalar_t>(values.gate[i]);
      pair[(2 * i + 1) / width].values[(2 * i + 1) % width] = static_cast<scalar_t>(values.up[i]);
    }
    row[2 * column] = pair[0];
    row[2 * column + 1] = pair[1];
  } else {
    Vector<scalar_t, width> packed;
#pragma unroll
    for (int i = 0; i < width; ++i) packed.values[i] = static_cast<scalar_t>(values.gate[i]);
    row[column] = packed;
    if constexpr (mode == RowMode::kConcatenated) {
#pragma unroll
      for (int i = 0; i < width; ++i) packed.values[i] = static_cast<scalar_t>(values.up[i]);
      row[row_vectors + column] = packed;
    }
  }
}

// The kind is a run-time choice, once per vector: the kernels are bound by memory, and a kernel per activation, layout
// and dtype would cost more code than it saves time.
template <RowMode mode, typename Body>
__device__ void dispatch_on_device(Activation kind, Body&& body) {
  if constexpr (mode == RowMode::kPlain) {
    switch (kind) {
      case Activation::kSilu: return body(ActivationTag<Activation::kSilu>{});
      case Activation::kGelu: return body(ActivationTag<Activation::kGelu>{});
      case Activation::kGeluTanh: return body(ActivationTag<Activation::kGeluTanh>{});
      case Activation::kQuickGelu: return body(ActivationTag<Activation::kQuickGelu>{});
      case Activation::kRelu: return body(ActivationTag<Activation::kRelu>{});
      case Activation::kReluSquared: return body(ActivationTag<Activation::kReluSquared>{});
      default: return body(ActivationTag<Activation::kNone>{});
    }
  } else {
    switch (kind) {
      case Activation::kSwigluClamped: return body(ActivationTag<Activation::kSwigluClamped>{});
      case Activation::kSwigluLimited: return body(ActivationTag<Activation::kSwigluLimited>{});
      case Activation::kGeglu: return body(ActivationTag<Activation::kGeglu>{});
      case Activation::kGegluTanh: return body(ActivationTag<Activation::kGegluTanh>{});
      case Activation::kReglu: return body(ActivationTag<Activation::kReglu>{});
      default: return body(ActivationTag<Activation::kSwiglu>{});
    }
  }
}

// value = activation(x); derivative = its derivatives to gate and up (plain: gate only); as exact as scalar_t is.
template <RowMode mode, typename scalar_t, int width>
__device__ void evaluate(const DeviceActivation& activation, const GateUpVector<width>& x, float (&value)[width],
                         GateUpVector<width>& derivative) {
  constexpr Precision kPrecision = precision_for<scalar_t>();
  dispatch_on_device<mode>(activation.kind, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if constexpr (mode == RowMode::kPlain) {
        const auto f = scalar_function<kind.value, kPrecision>(x.gate[i]);
        value[i] = f.value;
        derivative.gate[i] = f.derivative;
      } else {
        const auto f = gated_function<kind.value, kPrecision>(x.gate[i], x.up[i], activation.alpha, activation.limit);
        value[i] = f.value;
        derivative.gate[i] = f.gate_derivative;
        derivative.up[i] = f.up_derivative;
      }
    }
  });
}

// The expert that holds a row, -1 if none does: the last one that begins at or before it.
__device__ inline int64_t expert_of_row(const int32_t* expert_offsets, int64_t num_experts, int64_t row) {
  if (row < expert_offsets[0]) return -1;
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (expert_offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return row < expert_offsets[low + 1] ? low : -1;
}

// body(std::integral_constant<RowMode, ...>{})
template <typename Body>
void dispatch_row_mode(const ActivationSpec& spec, Body&& body) {
  switch (row_mode(spec)) {
    case RowMode::kPlain: return body(std::integral_constant<RowMode, RowMode::kPlain>{});
    case RowMode::kConcatenated: return body(std::integral_constant<RowMode, RowMode::kConcatenated>{});
    case RowMode::kInterleaved: return body(std::integral_constant<RowMode, RowMode::kInterleaved>{});
  }
}

}  // namespace moe_ext::cuda
