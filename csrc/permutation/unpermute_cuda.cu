// unpermute and its backward on CUDA. Sums run over a token's slots in slot order, in fp32: deterministic, no atomics.
//
// unpermute
//   Mapping: one warp per (token, segment of its row); kVectorsPerLane 16-byte vectors per lane and row, the rows of
//     the token's slots one after the other into fp32 registers.
//   Traffic: up to T*topk*H elements read, T*H written, 8*T*topk bytes of maps and weights. Bound: device memory.
// unpermute_backward
//   Mapping: one warp per permuted row. It reads the row and grad_output[token] once, writes weight * grad_output and
//     reduces their dot product by shuffles in a fixed order. The warps of one token's slots find grad_output in L2.
//   Traffic: M*H + T*H elements read, M*H written. Bound: device memory.
#include "unpermute.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kVectorsPerLane = 2;

template <typename scalar_t, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    unpermute_kernel(const scalar_t* __restrict__ input, const int32_t* __restrict__ slot_to_permuted,
                     const float* __restrict__ topk_weights, scalar_t* __restrict__ output, RowMaps maps,
                     int64_t row_vectors, int64_t segments) {
  using Packed = Vector<scalar_t, width>;
  const auto* source = reinterpret_cast<const Packed*>(input);
  auto* destination = reinterpret_cast<Packed*>(output);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t item_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t item = first_item; item < maps.num_tokens * segments; item += item_stride) {
    const int64_t token = item / segments;
    const int64_t first_vector = item % segments * kVectorsPerLane * kWarpSize + lane;
    float sums[kVectorsPerLane][width] = {};
#pragma unroll 4
    for (int64_t j = 0; j < maps.topk; ++j) {
      const int64_t slot = token * maps.topk + j;
      const int64_t row = slot_to_permuted[slot];
      if (row < 0 || row >= maps.num_rows) continue;
      const float weight = topk_weights ? topk_weights[slot] : 1.f;
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column >= row_vectors) continue;
        const Packed values = source[row * row_vectors + column];
#pragma unroll
        for (int i = 0; i < width; ++i) sums[v][i] += weight * static_cast<float>(values.values[i]);
      }
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      const int64_t column = first_vector + v * kWarpSize;
      if (column >= row_vectors) continue;
      Packed rounded;
#pragma unroll
      for (int i = 0; i < width; ++i) rounded.values[i] = static_cast<scalar_t>(sums[v][i]);
      destination[token * row_vectors + column] = rounded;
    }
  }
}

template <typename scalar_t, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    unpermute_backward_kernel(const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ input,
                              const int32_t* __restrict__ permuted_to_slot, const float* __restrict__ topk_weights,
                              scalar_t* __restrict__ grad_input, float* __restrict__ grad_weights, RowMaps maps,
                              int64_t row_vectors) {
  using Packed = Vector<scalar_t, width>;
  const auto* gradient = reinterpret_cast<const Packed*>(grad_output);
  const auto* source = reinterpret_cast<const Packed*>(input);
  auto* destination = reinterpret_cast<Packed*>(grad_input);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = first_row; row < maps.num_rows; row += row_stride) {
    const int64_t slot = permuted_to_slot[row];
    if (slot < 0 || slot >= maps.num_slots) {
      for (int64_t column = lane; column < row_vectors; column += kWarpSize) {
        destination[row * row_vectors + column] = Packed{};
      }
      continue;
    }
    const int64_t token = slot / maps.topk;
    const float weight = topk_weights[slot];
    float dot = 0.f;
#pragma unroll 4
    for (int64_t column = lane; column < row_vectors; column += kWarpSize) {
      const Packed grad = gradient[token * row_vectors + column];
      const Packed values = source[row * row_vectors + column];
      Packed scaled;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float g = static_cast<float>(grad.values[i]);
        dot += g * static_cast<float>(values.values[i]);
        scaled.values[i] = static_cast<scalar_t>(weight * g);
      }
      destination[row * row_vectors + column] = scaled;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    if (lane == 0) grad_weights[slot] = dot;
  }
}

template <typename scalar_t, int width>
void launch_unpermute(const Tensor& rows, const Tensor& row_of_slot, const float* weights, Tensor& output,
                      const RowMaps& maps) {
  const int64_t row_vectors = rows.size(1) / width;
  const int64_t segments = ceil_div(row_vectors, kVectorsPerLane * kWarpSize);
  if (maps.num_tokens * segments == 0) return;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(maps.num_tokens * segments, kWarpsPerBlock), kMaxBlocks));
  launch_kernel(unpermute_kernel<scalar_t, width>, blocks, kWarpsPerBlock * kWarpSize, 0, current_stream(rows),
                rows.const_data_ptr<scalar_t>(), row_of_slot.const_data_ptr<int32_t>(), weights,
                output.mutable_data_ptr<scalar_t>(), maps, row_vectors, segments);
}

template <typename scalar_t, int width>
void launch_unpermute_backward(const Tensor& gradient, const Tensor& rows, const Tensor& slot_of_row,
                               const Tensor& weights, Tensor& grad_input, Tensor& grad_weights, const RowMaps& maps) {
  if (maps.num_rows == 0) return;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(maps.num_rows, kWarpsPerBlock), kMaxBlocks));
  launch_kernel(unpermute_backward_kernel<scalar_t, width>, blocks, kWarpsPerBlock * kWarpSize, 0, current_stream(rows),
                gradient.const_data_ptr<scalar_t>(), rows.const_data_ptr<scalar_t>(),
                slot_of_row.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(),
                grad_input.mutable_data_ptr<scalar_t>(), grad_weights.mutable_data_ptr<float>(), maps,
                rows.size(1) / width);
}

}  // namespace

Tensor unpermute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                 const std::optional<Tensor>& topk_weights, int64_t topk) {
  const RowMaps maps = check_unpermute(input, permuted_to_slot, slot_to_permuted, topk_weights, topk);
  const DeviceGuard guard(input.get_device_index());
  const Tensor rows = torch::stable::contiguous(input);
  const Tensor row_of_slot = torch::stable::contiguous(slot_to_permuted);
  const std::optional<Tensor> weights =
      topk_weights.has_value() ? std::optional(torch::stable::contiguous(*topk_weights)) : std::nullopt;
  Tensor output = torch::stable::new_empty(input, {maps.num_tokens, input.size(1)});
  dispatch_floating_cuda(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const float* weight = weights ? weights->const_data_ptr<float>() : nullptr;
    if (rows_are_vectorizable<scalar_t>(input.size(1), {rows.const_data_ptr(), output.const_data_ptr()})) {
      launch_unpermute<scalar_t, full_width<scalar_t>()>(rows, row_of_slot, weight, output, maps);
    } else {
      launch_unpermute<scalar_t, 1>(rows, row_of_slot, weight, output, maps);
    }
  });
  return output;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_output, const Tensor& input,
                                              const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                                              const Tensor& topk_weights) {
  const RowMaps maps = check_unpermute_backward(grad_output, input, permuted_to_slot, slot_to_permuted, topk_weights);
  const DeviceGuard guard(input.get_device_index());
  const Tensor gradient = torch::stable::contiguous(grad_output);
  const Tensor rows = torch::stable::contiguous(input);
  const Tensor slot_of_row = torch::stable::contiguous(permuted_to_slot);
  const Tensor weights = torch::stable::contiguous(topk_weights);
  Tensor grad_input = torch::stable::new_empty(input, {maps.num_rows, input.size(1)});
  // Dropped slots have no row: their weight gradient stays zero.
  Tensor grad_weights = torch::stable::new_zeros(topk_weights, {maps.num_tokens, maps.topk});
  dispatch_floating_cuda(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if (rows_are_vectorizable<scalar_t>(
            input.size(1), {gradient.const_data_ptr(), rows.const_data_ptr(), grad_input.const_data_ptr()})) {
      launch_unpermute_backward<scalar_t, full_width<scalar_t>()>(gradient, rows, slot_of_row, weights, grad_input,
                                                                  grad_weights, maps);
    } else {
      launch_unpermute_backward<scalar_t, 1>(gradient, rows, slot_of_row, weights, grad_input, grad_weights, maps);
    }
  });
  return {grad_input, grad_weights};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("unpermute", TORCH_BOX(&moe_ext::cuda::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&moe_ext::cuda::unpermute_backward));
}
