// unpermute and its backward on CUDA. Sums run over a token's slots in slot order, in fp32: deterministic, no atomics.
// In both, the lanes of a warp hold the row numbers and weights of 32 slots at a time, and kRowsAtOnce rows are loaded
// before the first is used.
//
// unpermute
//   Mapping: one warp per token, which walks its row in segments of kVectorsPerLane 16-byte vectors per lane.
//   Traffic: up to T*topk*H elements read, T*H written, 8*T*topk bytes of maps and weights.
//   In flight: 2 KiB per warp, 32 warps per multiprocessor (at most 64 registers): 64 KiB, where HBM3 wants
//     3.35 TB/s * 700 ns / 132 = 18 KiB. Bound: device memory.
// unpermute_backward
//   Mapping: by token too, so that grad_output is read once and not once per slot: a warp (up to a block of them where
//     tokens are few) reads a segment of grad_output and of the token's rows, writes weight * grad_output and adds up
//     the products, kSlotsAtOnce sums at a time, reduced in a fixed order. Further blocks zero the empty rows.
//   Traffic: M*H + T*H elements read, M*H written. In flight: 2.5 KiB per warp, 16 warps (102 registers in bfloat16):
//   40 KiB.
#include "unpermute.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "padding_rows.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kVectorsPerLane = 1;  // with two, the converted values of bfloat16 rows do not fit in registers
constexpr int kSegment = kVectorsPerLane * kWarpSize;
constexpr int kRowsAtOnce = 4;
constexpr int kSlotsAtOnce = 8;
constexpr int64_t kResidentWarps = 16;  // at least, of either kernel

// Slots first_slot + lane of a token: -1 past its last slot and where the slot has no row.
__device__ int32_t load_slot_row(const int32_t* slot_to_permuted, const RowMaps& maps, int64_t token,
                                 int64_t first_slot) {
  const int64_t j = first_slot + threadIdx.x % kWarpSize;
  const int32_t row = j < maps.topk ? slot_to_permuted[token * maps.topk + j] : -1;
  return row < maps.num_rows ? row : -1;
}

// The segment of kRowsAtOnce rows of a batch, zeros where there is none.
template <typename Packed>
__device__ void load_rows(const Packed* rows, int32_t lane_row, int first, int64_t row_vectors, int64_t first_vector,
                          Packed (&values)[kRowsAtOnce][kVectorsPerLane], int32_t (&row)[kRowsAtOnce]) {
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    row[r] = __shfl_sync(kFullMask, lane_row, first + r);
    const Packed* source = rows + row[r] * row_vectors + first_vector;
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      values[r][v] = Packed{};
      if (row[r] >= 0 && first_vector + v * kWarpSize < row_vectors) values[r][v] = load_once(source + v * kWarpSize);
    }
  }
}

template <typename scalar_t, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, 4)
    unpermute_kernel(const scalar_t* __restrict__ input, const int32_t* __restrict__ slot_to_permuted,
                     const float* __restrict__ topk_weights, scalar_t* __restrict__ output, RowMaps maps,
                     int64_t row_vectors, int segments) {
  using Packed = Vector<scalar_t, width>;
  const auto* rows = reinterpret_cast<const Packed*>(input);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t token_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t token = first_token; token < maps.num_tokens; token += token_stride) {
    auto* destination = reinterpret_cast<Packed*>(output) + token * row_vectors;
    for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
      const int64_t first_vector = static_cast<int64_t>(segment) * kSegment + lane;
      float sums[kVectorsPerLane][width] = {};
      for (int64_t first_slot = 0; first_slot < maps.topk; first_slot += kWarpSize) {
        const int32_t lane_row = load_slot_row(slot_to_permuted, maps, token, first_slot);
        float lane_weight = 1.f;
        if (topk_weights) lane_weight = lane_row >= 0 ? topk_weights[token * maps.topk + first_slot + lane] : 0.f;
        const int slots = static_cast<int>(min(maps.topk - first_slot, static_cast<int64_t>(kWarpSize)));
#pragma unroll 1
        for (int j = 0; j < slots; j += kRowsAtOnce) {
          Packed values[kRowsAtOnce][kVectorsPerLane];
          int32_t row[kRowsAtOnce];
          load_rows(rows, lane_row, j, row_vectors, first_vector, values, row);
#pragma unroll
          for (int r = 0; r < kRowsAtOnce; ++r) {
            const float weight = __shfl_sync(kFullMask, lane_weight, j + r);
#pragma unroll
            for (int v = 0; v < kVectorsPerLane; ++v) {
#pragma unroll
              for (int i = 0; i < width; ++i) sums[v][i] += weight * static_cast<float>(values[r][v].values[i]);
            }
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        if (first_vector + v * kWarpSize >= row_vectors) continue;
        Packed rounded;
#pragma unroll
        for (int i = 0; i < width; ++i) rounded.values[i] = static_cast<scalar_t>(sums[v][i]);
        destination[first_vector + v * kWarpSize] = rounded;
      }
    }
  }
}

// Slots first .. first + kSlotsAtOnce - 1 of the batch: the segments of one of a token's warps.
template <typename scalar_t, int width>
__device__ void unpermute_backward_slots(const Vector<scalar_t, width>* gradient, const Vector<scalar_t, width>* rows,
                                         Vector<scalar_t, width>* grad_rows, int32_t lane_row, float lane_weight,
                                         int first, int slots, int64_t row_vectors, int segments, int first_segment,
                                         int segment_stride, float (&dots)[kSlotsAtOnce]) {
  using Packed = Vector<scalar_t, width>;
#pragma unroll 1
  for (int segment = first_segment; segment < segments; segment += segment_stride) {
    const int64_t first_vector = static_cast<int64_t>(segment) * kSegment + threadIdx.x % kWarpSize;
    Packed grad[kVectorsPerLane];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      grad[v] = Packed{};
      if (first_vector + v * kWarpSize < row_vectors) grad[v] = gradient[first_vector + v * kWarpSize];
    }
#pragma unroll
    for (int j = 0; j < kSlotsAtOnce; j += kRowsAtOnce) {
      if (first + j >= slots) break;
      Packed values[kRowsAtOnce][kVectorsPerLane];
      int32_t row[kRowsAtOnce];
      load_rows(rows, lane_row, first + j, row_vectors, first_vector, values, row);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const float weight = __shfl_sync(kFullMask, lane_weight, first + j + r);
        Packed* target = grad_rows + row[r] * row_vectors + first_vector;
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v) {
          Packed scaled;
#pragma unroll
          for (int i = 0; i < width; ++i) {
            const float g = static_cast<float>(grad[v].values[i]);
            dots[j + r] += g * static_cast<float>(values[r][v].values[i]);
            scaled.values[i] = static_cast<scalar_t>(weight * g);
          }
          if (row[r] >= 0 && first_vector + v * kWarpSize < row_vectors) target[v * kWarpSize] = scaled;
        }
      }
    }
  }
}

// warps_per_token: a power of two up to kWarpsPerBlock.
template <typename scalar_t, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, 2)
    unpermute_backward_kernel(const scalar_t* __restrict__ grad_output, const scalar_t* __restrict__ input,
                              const int32_t* __restrict__ permuted_to_slot,
                              const int32_t* __restrict__ slot_to_permuted, const float* __restrict__ topk_weights,
                              scalar_t* __restrict__ grad_input, float* __restrict__ grad_weights, RowMaps maps,
                              int64_t chunks, int64_t row_vectors, int segments, int warps_per_token) {
  using Packed = Vector<scalar_t, width>;
  __shared__ float warp_dots[kWarpsPerBlock][kSlotsAtOnce];
  auto* grad_rows = reinterpret_cast<Packed*>(grad_input);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, part = warp % warps_per_token;
  const int items_per_block = kWarpsPerBlock / warps_per_token;
  const int64_t token_blocks = (maps.num_tokens + items_per_block - 1) / items_per_block;
  const int64_t chunk_blocks = (chunks + kWarpsPerBlock - 1) / kWarpsPerBlock;
  for (int64_t block = blockIdx.x; block < token_blocks + chunk_blocks; block += gridDim.x) {
    if (block >= token_blocks) {
      const int64_t chunk = (block - token_blocks) * kWarpsPerBlock + warp;
      if (chunk < chunks) zero_padding_rows(permuted_to_slot, grad_rows, maps, chunk, row_vectors, lane, kWarpSize);
      continue;
    }
    const int64_t token = block * items_per_block + warp / warps_per_token;
    const bool inside = token < maps.num_tokens;
    const auto* gradient = reinterpret_cast<const Packed*>(grad_output) + (inside ? token : 0) * row_vectors;
    for (int64_t first_slot = 0; first_slot < maps.topk; first_slot += kWarpSize) {
      const int32_t lane_row = inside ? load_slot_row(slot_to_permuted, maps, token, first_slot) : -1;
      const float lane_weight = lane_row >= 0 ? topk_weights[token * maps.topk + first_slot + lane] : 0.f;
      const int slots = static_cast<int>(min(maps.topk - first_slot, static_cast<int64_t>(kWarpSize)));
      for (int first = 0; first < slots; first += kSlotsAtOnce) {
        float dots[kSlotsAtOnce] = {};
        unpermute_backward_slots(gradient, reinterpret_cast<const Packed*>(input), grad_rows, lane_row, lane_weight,
                                 first, slots, row_vectors, segments, part, warps_per_token, dots);
#pragma unroll
        for (int j = 0; j < kSlotsAtOnce; ++j) {
#pragma unroll
          for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
            dots[j] += __shfl_xor_sync(kFullMask, dots[j], offset);
          }
          if (lane == j) warp_dots[warp][j] = dots[j];
        }
        const bool held = __shfl_sync(kFullMask, lane_row, first + lane % kSlotsAtOnce) >= 0;
        __syncthreads();
        if (inside && part == 0 && lane < kSlotsAtOnce && first + lane < slots) {
          float dot = 0.f;
          for (int w = 0; w < warps_per_token; ++w) dot += warp_dots[warp + w][lane];
          // A dropped slot has no row, and weight gradient zero, whatever the gradient: 0 * inf would be NaN.
          grad_weights[token * maps.topk + first_slot + first + lane] = held ? dot : 0.f;
        }
        __syncthreads();
      }
    }
  }
}

template <typename scalar_t, int width>
void launch_unpermute(const Tensor& rows, const Tensor& row_of_slot, const float* weights, Tensor& output,
                      const RowMaps& maps) {
  const RowGrid grid(rows, maps.num_tokens, rows.size(1) / width, kSegment, kWarpsPerBlock, kResidentWarps);
  if (grid.empty()) return;
  launch_kernel(unpermute_kernel<scalar_t, width>, grid.blocks, kWarpsPerBlock * kWarpSize, 0, current_stream(rows),
                rows.const_data_ptr<scalar_t>(), row_of_slot.const_data_ptr<int32_t>(), weights,
                output.mutable_data_ptr<scalar_t>(), maps, grid.row_vectors, grid.segments);
}

template <typename scalar_t, int width>
void launch_unpermute_backward(const Tensor& gradient, const Tensor& rows, const Tensor& slot_of_row,
                               const Tensor& row_of_slot, const Tensor& weights, Tensor& grad_input,
                               Tensor& grad_weights, const RowMaps& maps) {
  const int64_t chunks = padding_chunks(maps), row_vectors = rows.size(1) / width;
  const int64_t multiprocessors = multiprocessor_count(rows);
  int warps_per_token = 1;
  while (warps_per_token < kWarpsPerBlock && maps.num_tokens * warps_per_token < kResidentWarps * multiprocessors) {
    warps_per_token *= 2;
  }
  const int64_t blocks = ceil_div(maps.num_tokens, kWarpsPerBlock / warps_per_token) + ceil_div(chunks, kWarpsPerBlock);
  if (blocks == 0) return;
  launch_kernel(unpermute_backward_kernel<scalar_t, width>,
                static_cast<unsigned>(std::min(blocks, RowGrid::kWavesPerGrid * kResidentWarps * multiprocessors)),
                kWarpsPerBlock * kWarpSize, 0, current_stream(rows), gradient.const_data_ptr<scalar_t>(),
                rows.const_data_ptr<scalar_t>(), slot_of_row.const_data_ptr<int32_t>(),
                row_of_slot.const_data_ptr<int32_t>(), weights.const_data_ptr<float>(),
                grad_input.mutable_data_ptr<scalar_t>(), grad_weights.mutable_data_ptr<float>(), maps, chunks,
                row_vectors, static_cast<int>(ceil_div(row_vectors, kSegment)), warps_per_token);
}

}  // namespace

Tensor unpermute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted,
                 const std::optional<Tensor>& topk_weights, int64_t topk) {
  const RowMaps maps = check_unpermute(input, permuted_to_slot, slot_to_permuted, topk_weights, topk);
  const DeviceGuard guard(input.get_device_index());
  const Tensor rows = as_contiguous(input);
  const Tensor row_of_slot = as_contiguous(slot_to_permuted);
  const std::optional<Tensor> weights = as_contiguous(topk_weights);
  Tensor output = make_tensor(input, {maps.num_tokens, input.size(1)});
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
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor rows = as_contiguous(input);
  const Tensor slot_of_row = as_contiguous(permuted_to_slot);
  const Tensor row_of_slot = as_contiguous(slot_to_permuted);
  const Tensor weights = as_contiguous(topk_weights);
  Tensor grad_input = make_tensor(input, {maps.num_rows, input.size(1)});
  Tensor grad_weights = make_tensor(topk_weights, {maps.num_tokens, maps.topk});
  dispatch_floating_cuda(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if (rows_are_vectorizable<scalar_t>(
            input.size(1), {gradient.const_data_ptr(), rows.const_data_ptr(), grad_input.const_data_ptr()})) {
      launch_unpermute_backward<scalar_t, full_width<scalar_t>()>(gradient, rows, slot_of_row, row_of_slot, weights,
                                                                  grad_input, grad_weights, maps);
    } else {
      launch_unpermute_backward<scalar_t, 1>(gradient, rows, slot_of_row, row_of_slot, weights, grad_input,
                                             grad_weights, maps);
    }
  });
  return {grad_input, grad_weights};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("unpermute", TORCH_BOX(&moe_ext::cuda::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&moe_ext::cuda::unpermute_backward));
}
