// Activations of rows on CUDA, forward (with the bias of grouped_gemm) and backward. Computed in fp32.
// Mapping: one warp per row, which walks its segments; a segment is kVectorsPerLane 16-byte vectors of output per lane,
//   all loaded before the first is computed. With a bias every warp finds its row's expert by bisecting expert_offsets,
//   which stays in L1.
// Traffic per row of pre-activation width P and output width W: forward P read, W written, P written back where a bias
//   is added to a kept pre-activation; backward P + W read, P written. Bound: device memory.
// In flight: 2 KiB per warp for a gated activation (backward 3 KiB), 16 warps or more per multiprocessor: 32 KiB, where
//   HBM3 wants 3.35 TB/s * 700 ns / 132 = 18 KiB.
#include "expert_activation.h"

#include <torch/csrc/stable/library.h>

#include "../common/row_access.h"
#include "../common/tensors.h"
#include "activation_epilogue.h"
#include "activation_vectors.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;
constexpr int kVectorsPerLane = 2;
constexpr int kSegment = kVectorsPerLane * kWarpSize;
constexpr int64_t kResidentWarps = 16;

struct BiasedRows {
  const void* bias;  // [num_experts, width of the pre-activation], or null
  const int32_t* expert_offsets;
  int64_t num_experts;
};

// Null output: the bias alone.
template <RowMode mode, typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads, 2)
    activation_kernel(scalar_t* pre_activation, scalar_t* output, BiasedRows biased, DeviceActivation activation,
                      bool write_pre_activation, int64_t num_rows, int64_t row_vectors, int segments) {
  using Packed = Vector<scalar_t, width>;
  constexpr int kParts = mode == RowMode::kPlain ? 1 : 2;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize; row < num_rows;
       row += row_stride) {
    auto* source = reinterpret_cast<Packed*>(pre_activation) + row * row_vectors * kParts;
    const Packed* bias = nullptr;
    if (biased.bias) {
      const int64_t expert = expert_of_row(biased.expert_offsets, biased.num_experts, row);
      if (expert >= 0) bias = static_cast<const Packed*>(biased.bias) + expert * row_vectors * kParts;
    }
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
      const int64_t first_vector = static_cast<int64_t>(segment) * kSegment + lane;
      GateUpVector<width> loaded[kVectorsPerLane];
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column < row_vectors) loaded[v] = load_gate_up<mode>(source, column, row_vectors);
      }
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column >= row_vectors) continue;
        GateUpVector<width>& x = loaded[v];
        if (bias) {
          const GateUpVector<width> added = load_gate_up<mode>(bias, column, row_vectors);
#pragma unroll
          for (int i = 0; i < width; ++i) {
            x.gate[i] += added.gate[i];
            if constexpr (mode != RowMode::kPlain) x.up[i] += added.up[i];
          }
          if (write_pre_activation) store_gate_up<mode>(source, column, row_vectors, x);
        }
        if (!output) continue;
        float value[width];
        GateUpVector<width> derivative;
        evaluate<mode, scalar_t>(activation, x, value, derivative);
        Packed packed;
#pragma unroll
        for (int i = 0; i < width; ++i) packed.values[i] = static_cast<scalar_t>(value[i]);
        reinterpret_cast<Packed*>(output)[row * row_vectors + column] = packed;
      }
    }
  }
}

template <RowMode mode, typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads, 2)
    activation_backward_kernel(const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ pre_activation,
                               scalar_t* __restrict__ grad_pre_activation, DeviceActivation activation,
                               int64_t num_rows, int64_t row_vectors, int segments) {
  using Packed = Vector<scalar_t, width>;
  constexpr int kParts = mode == RowMode::kPlain ? 1 : 2;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize; row < num_rows;
       row += row_stride) {
    const auto* source = reinterpret_cast<const Packed*>(pre_activation) + row * row_vectors * kParts;
    const auto* gradient = reinterpret_cast<const Packed*>(grad_output) + row * row_vectors;
    auto* destination = reinterpret_cast<Packed*>(grad_pre_activation) + row * row_vectors * kParts;
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
      const int64_t first_vector = static_cast<int64_t>(segment) * kSegment + lane;
      GateUpVector<width> loaded[kVectorsPerLane];
      Packed grads[kVectorsPerLane];
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column >= row_vectors) continue;
        grads[v] = load_once(gradient + column);
        loaded[v] = load_gate_up<mode>(source, column, row_vectors);
      }
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column >= row_vectors) continue;
        float value[width];
        GateUpVector<width> derivative;
        evaluate<mode, scalar_t>(activation, loaded[v], value, derivative);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const float g = static_cast<float>(grads[v].values[i]);
          derivative.gate[i] *= g;
          if constexpr (mode != RowMode::kPlain) derivative.up[i] *= g;
        }
        store_gate_up<mode>(destination, column, row_vectors, derivative);
      }
    }
  }
}

RowGrid activation_grid(const Tensor& rows, int64_t row_vectors) {
  return RowGrid(rows, rows.size(0), row_vectors, kSegment, kWarpsPerBlock, kResidentWarps);
}

void launch_forward(Tensor& pre_activation, Tensor* output, const std::optional<Tensor>& bias,
                    const Tensor* expert_offsets, const ActivationSpec& spec, bool write_pre_activation) {
  const int64_t num_rows = pre_activation.size(0), out_width = spec.output_width(pre_activation.size(1));
  if (num_rows == 0 || out_width == 0) return;
  const BiasedRows biased = {bias ? bias->const_data_ptr() : nullptr,
                             bias ? expert_offsets->const_data_ptr<int32_t>() : nullptr, bias ? bias->size(0) : 0};
  dispatch_floating_cuda(pre_activation.scalar_type(), "pre_activation", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    auto* rows = pre_activation.mutable_data_ptr<scalar_t>();
    auto* out = output ? output->mutable_data_ptr<scalar_t>() : nullptr;
    dispatch_row_mode(spec, [&](auto mode) {
      const auto launch = [&](auto width) {
        const RowGrid grid = activation_grid(pre_activation, out_width / width.value);
        launch_kernel(activation_kernel<mode.value, scalar_t, width.value>, grid.blocks, kThreads, 0,
                      current_stream(pre_activation), rows, out, biased, on_device(spec), write_pre_activation,
                      num_rows, grid.row_vectors, grid.segments);
      };
      if (rows_are_vectorizable<scalar_t>(out_width, {rows, out, biased.bias})) {
        launch(std::integral_constant<int, full_width<scalar_t>()>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
  });
}

}  // namespace

void add_bias(Tensor& product, const Tensor& bias, const Tensor& expert_offsets) {
  launch_forward(product, nullptr, bias, &expert_offsets, ActivationSpec{}, true);
}

Tensor activate_with_bias(Tensor& product, const std::optional<Tensor>& bias, const Tensor& expert_offsets,
                          const ActivationSpec& spec, bool keep_pre_activation) {
  Tensor output = make_tensor(product, {product.size(0), spec.output_width(product.size(1))});
  launch_forward(product, &output, bias, &expert_offsets, spec, keep_pre_activation);
  return output;
}

Tensor activate_rows(const Tensor& pre_activation, const ActivationSpec& spec) {
  const DeviceGuard guard(pre_activation.get_device_index());
  Tensor rows = as_contiguous(pre_activation);
  Tensor output = make_tensor(rows, {rows.size(0), spec.output_width(rows.size(1))});
  launch_forward(rows, &output, std::nullopt, nullptr, spec, false);
  return output;
}

Tensor expert_activation(const Tensor& pre_activation, std::string activation, std::string gate_up_layout,
                         double activation_alpha, double activation_limit) {
  return activate_rows(pre_activation, check_expert_activation(pre_activation, activation, gate_up_layout,
                                                               activation_alpha, activation_limit));
}

Tensor expert_activation_backward(const Tensor& grad_output, const Tensor& pre_activation, std::string activation,
                                  std::string gate_up_layout, double activation_alpha, double activation_limit) {
  const ActivationSpec spec = check_expert_activation_backward(grad_output, pre_activation, activation, gate_up_layout,
                                                               activation_alpha, activation_limit);
  const DeviceGuard guard(pre_activation.get_device_index());
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor rows = as_contiguous(pre_activation);
  const int64_t num_rows = rows.size(0), out_width = gradient.size(1);
  Tensor grad_rows = make_tensor(rows, {num_rows, rows.size(1)});
  if (num_rows == 0 || out_width == 0) return grad_rows;
  dispatch_floating_cuda(rows.scalar_type(), "pre_activation", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_row_mode(spec, [&](auto mode) {
      const auto launch = [&](auto width) {
        const RowGrid grid = activation_grid(rows, out_width / width.value);
        launch_kernel(activation_backward_kernel<mode.value, scalar_t, width.value>, grid.blocks, kThreads, 0,
                      current_stream(rows), gradient.const_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(),
                      grad_rows.mutable_data_ptr<scalar_t>(), on_device(spec), num_rows, grid.row_vectors,
                      grid.segments);
      };
      if (rows_are_vectorizable<scalar_t>(out_width, {gradient.const_data_ptr(), rows.const_data_ptr()})) {
        launch(std::integral_constant<int, full_width<scalar_t>()>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
  });
  return grad_rows;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("expert_activation", TORCH_BOX(&moe_ext::cuda::expert_activation));
  m.impl("expert_activation_backward", TORCH_BOX(&moe_ext::cuda::expert_activation_backward));
}
