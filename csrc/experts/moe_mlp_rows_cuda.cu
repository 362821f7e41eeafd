// The row-wise half of moe_mlp's backward on CUDA.
//
// mlp_rows_backward
//   Mapping: one warp per row, 16-byte vectors. In one pass it reads the pre-activation and dA', writes the gradient of
//     the pre-activation and, in place of dA', the activation times the router weight; <dA', A> is reduced by shuffles
//     in a fixed order. With a down_bias the same warp adds <dO[token], bias>.
//   Traffic per row: P + I elements read, P + I written (P = I or 2I); with a bias another 2H read, mostly from L2.
//   Bound: device memory.
// down_bias_grad
//   Mapping: one warp per row writes s * dO[token]; then the grouped bias gradient sums the rows of each expert.
//   Traffic: M*H elements read, written and read again. Bound: device memory.
#include "moe_mlp_rows.h"

#include "../common/tensors.h"
#include "../grouped_gemm/grouped_bias_grad.h"
#include "activation_vectors.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

struct RowsProblem {
  const void* pre_activation;
  void* grad_activated;
  void* grad_pre_activation;
  const void* grad_output;
  const void* down_bias;  // or null
  const int32_t* expert_offsets;
  const int32_t* permuted_to_slot;
  const float* topk_weights;  // or null
  float* grad_topk_weights;
  int64_t num_experts;
  int64_t row_vectors;     // of dA', in vectors
  int64_t hidden_vectors;  // of dO, in vectors
  RowMaps maps;
  DeviceActivation activation;
};

__device__ inline float sum_over_warp(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Where launch bounds name a number of blocks, ptxas left to itself spills a few registers to get one more in.
template <RowMode mode, typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads, width == 1 ? 4 : 0) mlp_rows_kernel(RowsProblem problem) {
  using Packed = Vector<scalar_t, width>;
  constexpr int kParts = mode == RowMode::kPlain ? 1 : 2;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const RowMaps maps = problem.maps;
  for (int64_t row = first_row; row < maps.num_rows; row += row_stride) {
    const auto* source = static_cast<const Packed*>(problem.pre_activation) + row * problem.row_vectors * kParts;
    auto* gradient = static_cast<Packed*>(problem.grad_activated) + row * problem.row_vectors;
    auto* destination = static_cast<Packed*>(problem.grad_pre_activation) + row * problem.row_vectors * kParts;
    const int64_t slot = problem.permuted_to_slot[row];
    if (slot < 0 || slot >= maps.num_slots) {
      for (int64_t column = lane; column < problem.row_vectors; column += kWarpSize) {
        gradient[column] = Packed{};
        store_gate_up<mode>(destination, column, problem.row_vectors, GateUpVector<width>{});
      }
      continue;
    }
    const float weight = problem.topk_weights ? problem.topk_weights[slot] : 1.f;
    float dot = 0.f;
#pragma unroll 2
    for (int64_t column = lane; column < problem.row_vectors; column += kWarpSize) {
      const Packed grad = gradient[column];
      float value[width];
      GateUpVector<width> derivative;
      evaluate<mode, scalar_t>(problem.activation, load_gate_up<mode>(source, column, problem.row_vectors), value,
                               derivative);
      Packed scaled;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float g = static_cast<float>(grad.values[i]);
        dot += g * value[i];
        scaled.values[i] = static_cast<scalar_t>(weight * value[i]);
        derivative.gate[i] *= weight * g;
        if constexpr (mode != RowMode::kPlain) derivative.up[i] *= weight * g;
      }
      gradient[column] = scaled;
      store_gate_up<mode>(destination, column, problem.row_vectors, derivative);
    }
    if (!problem.topk_weights) continue;
    if (problem.down_bias) {
      const int64_t expert = expert_of_row(problem.expert_offsets, problem.num_experts, row);
      if (expert >= 0) {
        const auto* token = static_cast<const Packed*>(problem.grad_output) + slot / maps.topk * problem.hidden_vectors;
        const auto* bias = static_cast<const Packed*>(problem.down_bias) + expert * problem.hidden_vectors;
        for (int64_t column = lane; column < problem.hidden_vectors; column += kWarpSize) {
          const Packed a = token[column], b = bias[column];
#pragma unroll
          for (int i = 0; i < width; ++i) dot += static_cast<float>(a.values[i]) * static_cast<float>(b.values[i]);
        }
      }
    }
    dot = sum_over_warp(dot);
    if (lane == 0) problem.grad_topk_weights[slot] = dot;
  }
}

template <typename scalar_t, int width>
__global__ void __launch_bounds__(kThreads, 4)
    scaled_rows_kernel(const scalar_t* __restrict__ tokens, const int32_t* __restrict__ permuted_to_slot,
                       const float* __restrict__ topk_weights, scalar_t* __restrict__ output, RowMaps maps,
                       int64_t row_vectors) {
  using Packed = Vector<scalar_t, width>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = first_row; row < maps.num_rows; row += row_stride) {
    const int64_t slot = permuted_to_slot[row];
    const bool held = slot >= 0 && slot < maps.num_slots;
    const float weight = held && topk_weights ? topk_weights[slot] : 1.f;
    const auto* source = reinterpret_cast<const Packed*>(tokens) + (held ? slot / maps.topk : 0) * row_vectors;
    auto* destination = reinterpret_cast<Packed*>(output) + row * row_vectors;
#pragma unroll 4
    for (int64_t column = lane; column < row_vectors; column += kWarpSize) {
      Packed values = {};
      if (held) {
        values = source[column];
#pragma unroll
        for (int i = 0; i < width; ++i) {
          values.values[i] = static_cast<scalar_t>(weight * static_cast<float>(values.values[i]));
        }
      }
      destination[column] = values;
    }
  }
}

unsigned blocks_for(int64_t num_rows) {
  return static_cast<unsigned>(std::min(ceil_div(num_rows, kWarpsPerBlock), kMaxBlocks));
}

}  // namespace

MlpRowGradients mlp_rows_backward(const MlpRows& rows, Tensor grad_activated) {
  const RowMaps maps = rows.maps;
  const int64_t row_width = rows.pre_activation.size(1), width = grad_activated.size(1);
  const int64_t hidden_size = rows.grad_output.size(1);
  const DeviceGuard guard(rows.grad_output.get_device_index());
  Tensor grad_pre_activation = make_tensor(rows.pre_activation, {maps.num_rows, row_width});
  // Dropped slots have no row: their weight gradient stays zero.
  Tensor grad_weights = torch::stable::new_zeros(rows.grad_output, {rows.topk_weights ? maps.num_tokens : 0, maps.topk},
                                                 ScalarType::Float);
  if (maps.num_rows == 0) return {grad_pre_activation, grad_activated, grad_weights};
  RowsProblem problem = {rows.pre_activation.const_data_ptr(),
                         grad_activated.mutable_data_ptr(),
                         grad_pre_activation.mutable_data_ptr(),
                         rows.grad_output.const_data_ptr(),
                         rows.down_bias ? rows.down_bias->const_data_ptr() : nullptr,
                         rows.expert_offsets.const_data_ptr<int32_t>(),
                         rows.permuted_to_slot.const_data_ptr<int32_t>(),
                         rows.topk_weights ? rows.topk_weights->const_data_ptr<float>() : nullptr,
                         grad_weights.mutable_data_ptr<float>(),
                         rows.expert_offsets.numel() - 1,
                         width,
                         hidden_size,
                         maps,
                         on_device(rows.activation)};
  dispatch_floating_cuda(rows.pre_activation.scalar_type(), "pre_activation", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_row_mode(rows.activation, [&](auto mode) {
      const auto launch = [&](auto vector_width) {
        problem.row_vectors = width / vector_width.value;
        problem.hidden_vectors = hidden_size / vector_width.value;
        launch_kernel(mlp_rows_kernel<mode.value, scalar_t, vector_width.value>, blocks_for(maps.num_rows), kThreads, 0,
                      current_stream(rows.grad_output), problem);
      };
      const bool aligned =
          rows_are_vectorizable<scalar_t>(width, {problem.pre_activation, problem.grad_activated}) &&
          (!rows.down_bias || rows_are_vectorizable<scalar_t>(hidden_size, {problem.grad_output, problem.down_bias}));
      if (aligned) {
        launch(std::integral_constant<int, full_width<scalar_t>()>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
  });
  return {grad_pre_activation, grad_activated, grad_weights};
}

Tensor down_bias_grad(const MlpRows& rows, ScalarType dtype) {
  const RowMaps maps = rows.maps;
  const int64_t width = rows.grad_output.size(1);
  const DeviceGuard guard(rows.grad_output.get_device_index());
  Tensor scaled = make_tensor(rows.grad_output, {maps.num_rows, width});
  if (maps.num_rows > 0 && width > 0) {
    dispatch_floating_cuda(rows.grad_output.scalar_type(), "grad_output", [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      const auto* tokens = rows.grad_output.const_data_ptr<scalar_t>();
      const auto launch = [&](auto vector_width) {
        launch_kernel(scaled_rows_kernel<scalar_t, vector_width.value>, blocks_for(maps.num_rows), kThreads, 0,
                      current_stream(rows.grad_output), tokens, rows.permuted_to_slot.const_data_ptr<int32_t>(),
                      rows.topk_weights ? rows.topk_weights->const_data_ptr<float>() : nullptr,
                      scaled.mutable_data_ptr<scalar_t>(), maps, width / vector_width.value);
      };
      if (rows_are_vectorizable<scalar_t>(width, {tokens})) {
        launch(std::integral_constant<int, full_width<scalar_t>()>{});
      } else {
        launch(std::integral_constant<int, 1>{});
      }
    });
  }
  return grouped_bias_grad(scaled, rows.expert_offsets, dtype);
}

}  // namespace moe_ext::cuda
