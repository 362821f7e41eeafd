// a2a_pack_rows on CUDA.
// Mapping: one warp per kSegment elements (fp8: 4 blocks of 128, four elements of each per lane) or kSegmentBytes bytes
//   (native: four 16-byte vectors per lane) of a send row, all loaded before the first store. The warp of a row's first
//   segment also writes ids, weights and padding; each writes the scales of its own blocks.
// Traffic: T*H elements read (a token's further copies come from L2), S * row_bytes written. Bound: memory.
#include "a2a_pack_rows.h"

#include <torch/csrc/stable/library.h>

#include "../common/row_access.h"
#include "../common/tensors.h"
#include "fp8_block.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kPiecesPerLane = 4;
constexpr int kElementsPerLane = static_cast<int>(kScaleBlock) / kWarpSize;  // of one block
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename scalar_t>
struct PackArguments {
  const scalar_t* hidden;
  const float* topk_weights;  // null: no weights travel
  const int32_t *rank_expert_offsets, *send_offsets, *send_to_slot;
  char* output;
  int64_t segments;
  PackRows pack;
};

template <typename index_t, typename scalar_t>
__device__ void write_metadata(const PackArguments<scalar_t>& arguments, const index_t* topk_ids, int64_t m,
                               int64_t token, char* bytes, int lane) {
  const PackedRow& row = arguments.pack.row;
  const int rank = find_interval(arguments.send_offsets, static_cast<int>(arguments.pack.shape.num_ranks), m);
  for (int64_t j = lane; j < row.topk; j += kWarpSize) {
    const auto entry = find_entry(token, rank, j, topk_ids, arguments.topk_weights, arguments.rank_expert_offsets,
                                  arguments.pack.shape);
    reinterpret_cast<int32_t*>(bytes + row.ids_at)[j] = entry.local_id;
    if (row.weight_bytes > 0) reinterpret_cast<float*>(bytes + row.weights_at)[j] = entry.weight;
  }
  for (int64_t at = row.padding_at() + 4 * lane; at < row.row_bytes; at += 4 * kWarpSize) {
    *reinterpret_cast<uint32_t*>(bytes + at) = 0;
  }
}

// `source` null: a row of zeros. width elements per load: kElementsPerLane, or 1 where rows are not aligned for that.
template <typename scalar_t, int width>
__device__ void quantise_segment(const scalar_t* source, int64_t segment, const PackedRow& row, char* bytes, int lane) {
  using Packed = Vector<scalar_t, width>;
  float values[kPiecesPerLane][kElementsPerLane];
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t first = (segment * kPiecesPerLane + piece) * kScaleBlock + lane * kElementsPerLane;
#pragma unroll
    for (int i = 0; i < kElementsPerLane; i += width) {
      Packed loaded = {};
      if (source != nullptr && first + i < row.hidden_size) {
        loaded = *reinterpret_cast<const Packed*>(source + first + i);
      }
#pragma unroll
      for (int v = 0; v < width; ++v) values[piece][i + v] = static_cast<float>(loaded.values[v]);
    }
  }
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t block = segment * kPiecesPerLane + piece;
    if (block >= row.scales) break;  // the same for all lanes
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kElementsPerLane; ++i) largest = larger_magnitude(largest, fabsf(values[piece][i]));
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      largest = larger_magnitude(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    const float scale = block_scale(largest);
    const BlockDivision divide(scale);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kElementsPerLane; i += 2) {
      word |= to_e4m3_pair(divide(values[piece][i]), divide(values[piece][i + 1])) << (8 * i);
    }
    const int64_t at = block * kScaleBlock + lane * kElementsPerLane;
    if (at < row.payload_bytes()) *reinterpret_cast<uint32_t*>(bytes + at) = word;
    if (lane == 0) reinterpret_cast<float*>(bytes + row.scales_at)[block] = scale;
  }
}

// width: elements per load, a full vector or 1.
template <typename scalar_t, int width>
__device__ void copy_segment(const scalar_t* source, int64_t segment, const PackedRow& row, char* bytes, int lane) {
  constexpr int kFull = full_width<scalar_t>();
  using Packed = Vector<scalar_t, kFull>;
  using Part = Vector<scalar_t, width>;
  Packed vectors[kPiecesPerLane];
  const int64_t first = segment * kPiecesPerLane * kWarpSize + lane;
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t element = (first + piece * kWarpSize) * kFull;
#pragma unroll
    for (int i = 0; i < kFull; i += width) {
      Part part = {};
      if (source != nullptr && element + i < row.hidden_size) {
        part = *reinterpret_cast<const Part*>(source + element + i);
      }
#pragma unroll
      for (int v = 0; v < width; ++v) vectors[piece].values[i + v] = part.values[v];
    }
  }
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t at = (first + piece * kWarpSize) * kVectorBytes;
    if (at < row.payload_bytes()) *reinterpret_cast<Packed*>(bytes + at) = vectors[piece];
  }
}

template <typename index_t, typename scalar_t, bool quantised, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    pack_rows_kernel(PackArguments<scalar_t> arguments, const index_t* __restrict__ topk_ids) {
  const PackShape& shape = arguments.pack.shape;
  const PackedRow& row = arguments.pack.row;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
       item < shape.num_rows * arguments.segments; item += stride) {
    const int64_t m = item / arguments.segments, segment = item % arguments.segments;
    const int64_t token = token_of_row(arguments.send_to_slot[m], shape);
    char* bytes = arguments.output + m * row.row_bytes;
    const scalar_t* source = token < 0 ? nullptr : arguments.hidden + token / arguments.pack.copies * row.hidden_size;
    if constexpr (quantised) {
      quantise_segment<scalar_t, width>(source, segment, row, bytes, lane);
    } else {
      copy_segment<scalar_t, width>(source, segment, row, bytes, lane);
    }
    if (segment == 0) write_metadata(arguments, topk_ids, m, token, bytes, lane);
  }
}

template <typename index_t, typename scalar_t, bool quantised, int width>
void launch(const PackArguments<scalar_t>& arguments, const index_t* topk_ids, const Tensor& like) {
  const int64_t items = arguments.pack.shape.num_rows * arguments.segments;
  launch_kernel(pack_rows_kernel<index_t, scalar_t, quantised, width>,
                static_cast<unsigned>(std::min(ceil_div(items, kWarpsPerBlock), kMaxBlocks)),
                kWarpsPerBlock * kWarpSize, 0, current_stream(like), arguments, topk_ids);
}

// Loads of `width` elements need rows that begin at a multiple of them.
template <typename scalar_t>
bool loads_are_aligned(const scalar_t* rows, int64_t hidden_size, int width) {
  return hidden_size % width == 0 && reinterpret_cast<uintptr_t>(rows) % (width * sizeof(scalar_t)) == 0;
}

}  // namespace

Tensor a2a_pack_rows(const Tensor& hidden, const Tensor& topk_ids, const std::optional<Tensor>& topk_weights,
                     const Tensor& rank_expert_offsets, const Tensor& send_offsets, const Tensor& send_to_slot,
                     const Tensor& slot_to_send, std::string payload, int64_t copies) {
  const PackRows pack = check_a2a_pack_rows(hidden, topk_ids, topk_weights, rank_expert_offsets, send_offsets,
                                            send_to_slot, slot_to_send, payload, copies);
  const DeviceGuard guard(hidden.get_device_index());
  const Tensor source = as_contiguous(hidden), ids = as_contiguous(topk_ids);
  const std::optional<Tensor> weights = as_contiguous(topk_weights);
  const Tensor owners = as_contiguous(rank_expert_offsets), starts = as_contiguous(send_offsets);
  const Tensor slots = as_contiguous(send_to_slot);
  Tensor packed = make_tensor(hidden, {pack.shape.num_rows, pack.row.row_bytes}, ScalarType::Byte);
  if (pack.shape.num_rows == 0) return packed;
  const bool quantised = pack.row.scales > 0;
  const int64_t segment_bytes = kPiecesPerLane * (quantised ? kScaleBlock : kWarpSize * kVectorBytes);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    dispatch_floating_cuda(hidden.scalar_type(), "hidden", [&](auto tag) {
      using index_t = typename decltype(index_tag)::type;
      using scalar_t = typename decltype(tag)::type;
      const PackArguments<scalar_t> arguments = {source.const_data_ptr<scalar_t>(),
                                                 weights ? weights->const_data_ptr<float>() : nullptr,
                                                 owners.const_data_ptr<int32_t>(),
                                                 starts.const_data_ptr<int32_t>(),
                                                 slots.const_data_ptr<int32_t>(),
                                                 static_cast<char*>(packed.mutable_data_ptr()),
                                                 ceil_div(pack.row.payload_bytes(), segment_bytes),
                                                 pack};
      const auto* id = ids.const_data_ptr<index_t>();
      constexpr int kFull = full_width<scalar_t>();
      const int width = quantised ? kElementsPerLane : kFull;
      const bool aligned = loads_are_aligned(arguments.hidden, pack.row.hidden_size, width);
      if (quantised) {
        aligned ? launch<index_t, scalar_t, true, kElementsPerLane>(arguments, id, hidden)
                : launch<index_t, scalar_t, true, 1>(arguments, id, hidden);
      } else {
        aligned ? launch<index_t, scalar_t, false, kFull>(arguments, id, hidden)
                : launch<index_t, scalar_t, false, 1>(arguments, id, hidden);
      }
    });
  });
  return packed;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("a2a_pack_rows", TORCH_BOX(&moe_ext::cuda::a2a_pack_rows));
}
