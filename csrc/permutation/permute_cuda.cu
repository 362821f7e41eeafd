// permute on CUDA.
// Mapping: one warp per (token, segment of its row); a segment is kVectorsPerLane 16-byte vectors per lane, all loaded
//   before the first store. The warp stores the segment to each of the token's topk rows. Further warps walk the
//   permuted rows and zero the segments of padding and tail rows.
// Traffic: T*H + M*H elements (each token row read once, each permuted row written once) + 4*(M + T*topk) index bytes.
// Bound: device memory.
#include "permute.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kVectorsPerLane = 4;

template <typename scalar_t, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    permute_kernel(const scalar_t* __restrict__ input, const int32_t* __restrict__ permuted_to_slot,
                   const int32_t* __restrict__ slot_to_permuted, scalar_t* __restrict__ output, RowMaps maps,
                   int64_t row_vectors, int64_t segments) {
  using Packed = Vector<scalar_t, width>;
  const auto* source = reinterpret_cast<const Packed*>(input);
  auto* destination = reinterpret_cast<Packed*>(output);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t item_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t item = first_item; item < (maps.num_tokens + maps.num_rows) * segments; item += item_stride) {
    const int64_t row = item / segments;
    const int64_t first_vector = item % segments * kVectorsPerLane * kWarpSize + lane;
    if (row >= maps.num_tokens) {
      const int64_t permuted_row = row - maps.num_tokens;
      const int32_t slot = permuted_to_slot[permuted_row];
      if (slot >= 0 && slot < maps.num_slots) continue;
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column < row_vectors) destination[permuted_row * row_vectors + column] = Packed{};
      }
      continue;
    }
    Packed segment[kVectorsPerLane];
#pragma unroll
    for (int v = 0; v < kVectorsPerLane; ++v) {
      const int64_t column = first_vector + v * kWarpSize;
      if (column < row_vectors) segment[v] = source[row * row_vectors + column];
    }
    for (int64_t j = 0; j < maps.topk; ++j) {
      const int64_t permuted_row = slot_to_permuted[row * maps.topk + j];
      if (permuted_row < 0 || permuted_row >= maps.num_rows) continue;
#pragma unroll
      for (int v = 0; v < kVectorsPerLane; ++v) {
        const int64_t column = first_vector + v * kWarpSize;
        if (column < row_vectors) destination[permuted_row * row_vectors + column] = segment[v];
      }
    }
  }
}

template <typename scalar_t, int width>
void launch(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, Tensor& output,
            const RowMaps& maps) {
  const int64_t row_vectors = input.size(1) / width;
  const int64_t segments = ceil_div(row_vectors, kVectorsPerLane * kWarpSize);
  const int64_t items = (maps.num_tokens + maps.num_rows) * segments;
  if (items == 0) return;
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(items, kWarpsPerBlock), kMaxBlocks));
  launch_kernel(permute_kernel<scalar_t, width>, blocks, kWarpsPerBlock * kWarpSize, 0, current_stream(input),
                input.const_data_ptr<scalar_t>(), permuted_to_slot.const_data_ptr<int32_t>(),
                slot_to_permuted.const_data_ptr<int32_t>(), output.mutable_data_ptr<scalar_t>(), maps, row_vectors,
                segments);
}

}  // namespace

Tensor permute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, int64_t topk) {
  const RowMaps maps = check_permute(input, permuted_to_slot, slot_to_permuted, topk);
  const DeviceGuard guard(input.get_device_index());
  const Tensor source = torch::stable::contiguous(input);
  const Tensor slots = torch::stable::contiguous(permuted_to_slot);
  const Tensor rows = torch::stable::contiguous(slot_to_permuted);
  Tensor output = torch::stable::new_empty(input, {maps.num_rows, input.size(1)});
  dispatch_floating_cuda(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if (rows_are_vectorizable<scalar_t>(input.size(1), {source.const_data_ptr(), output.const_data_ptr()})) {
      launch<scalar_t, full_width<scalar_t>()>(source, slots, rows, output, maps);
    } else {
      launch<scalar_t, 1>(source, slots, rows, output, maps);
    }
  });
  return output;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) { m.impl("permute", TORCH_BOX(&moe_ext::cuda::permute)); }
