// permute on CUDA.
// Mapping: one warp per token; a segment of its row is kVectorsPerLane 16-byte vectors per lane, all loaded before the
//   first store, and stored to each of the token's topk rows. The lanes hold the row numbers, 32 slots at a time,
//   loaded beside the first segment. Further warps look at kPaddingChunk permuted rows each and zero the empty ones.
// Traffic: T*H + M*H elements (each token row read once, each permuted row written once) + 4*(M + T*topk) index bytes.
// In flight: 2 KiB of reads per warp, kResidentWarps per multiprocessor (at most 56 registers): 64 KiB, where
//   HBM3 wants 3.35 TB/s * 700 ns / 132 = 18 KiB. Bound: device memory, mostly its writes.
#include "permute.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "padding_rows.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kVectorsPerLane = 4;
constexpr int64_t kResidentWarps = 32;

template <typename scalar_t, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    permute_kernel(const scalar_t* __restrict__ input, const int32_t* __restrict__ permuted_to_slot,
                   const int32_t* __restrict__ slot_to_permuted, scalar_t* __restrict__ output, RowMaps maps,
                   int64_t chunks, int64_t row_vectors, int segments) {
  using Packed = Vector<scalar_t, width>;
  constexpr int kSegment = kVectorsPerLane * kWarpSize;
  auto* destination = reinterpret_cast<Packed*>(output);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t item_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t item = first_item; item < maps.num_tokens + chunks; item += item_stride) {
    if (item >= maps.num_tokens) {
      zero_padding_rows(permuted_to_slot, destination, maps, item - maps.num_tokens, row_vectors,
                        static_cast<int64_t>(blockIdx.y) * kWarpSize + lane,
                        static_cast<int64_t>(gridDim.y) * kWarpSize);
      continue;
    }
    const auto* source = reinterpret_cast<const Packed*>(input) + item * row_vectors;
    for (int64_t first_slot = 0; first_slot < maps.topk; first_slot += kWarpSize) {
      const int slots = static_cast<int>(min(maps.topk - first_slot, static_cast<int64_t>(kWarpSize)));
      const int32_t lane_row = lane < slots ? slot_to_permuted[item * maps.topk + first_slot + lane] : -1;
      for (int segment = blockIdx.y; segment < segments; segment += gridDim.y) {
        const int64_t first_vector = static_cast<int64_t>(segment) * kSegment + lane;
        Packed vectors[kVectorsPerLane];
#pragma unroll
        for (int v = 0; v < kVectorsPerLane; ++v) {
          const int64_t column = first_vector + v * kWarpSize;
          if (column < row_vectors) vectors[v] = load_once(source + column);
        }
        for (int j = 0; j < slots; ++j) {
          const int32_t row = __shfl_sync(kFullMask, lane_row, j);
          if (row < 0 || row >= maps.num_rows) continue;
          Packed* target = destination + row * row_vectors + first_vector;
#pragma unroll
          for (int v = 0; v < kVectorsPerLane; ++v) {
            if (first_vector + v * kWarpSize < row_vectors) target[v * kWarpSize] = vectors[v];
          }
        }
      }
    }
  }
}

template <typename scalar_t, int width>
void launch(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, Tensor& output,
            const RowMaps& maps) {
  const int64_t chunks = padding_chunks(maps);
  const RowGrid grid(input, maps.num_tokens + chunks, input.size(1) / width, kVectorsPerLane * kWarpSize,
                     kWarpsPerBlock, kResidentWarps);
  if (grid.empty()) return;
  launch_kernel(permute_kernel<scalar_t, width>, grid.blocks, kWarpsPerBlock * kWarpSize, 0, current_stream(input),
                input.const_data_ptr<scalar_t>(), permuted_to_slot.const_data_ptr<int32_t>(),
                slot_to_permuted.const_data_ptr<int32_t>(), output.mutable_data_ptr<scalar_t>(), maps, chunks,
                grid.row_vectors, grid.segments);
}

}  // namespace

Tensor permute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, int64_t topk) {
  const RowMaps maps = check_permute(input, permuted_to_slot, slot_to_permuted, topk);
  const DeviceGuard guard(input.get_device_index());
  const Tensor source = as_contiguous(input);
  const Tensor slots = as_contiguous(permuted_to_slot);
  const Tensor rows = as_contiguous(slot_to_permuted);
  Tensor output = make_tensor(input, {maps.num_rows, input.size(1)});
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
