// a2a_unpack_rows on CUDA.
// Mapping: one warp per segment of a row, as in a2a_pack_rows: four 16-byte vectors per lane, or four fp8 blocks with
//   four elements of each per lane, all loaded before the first store. The warp of the first segment also moves ids and
//   weights.
// Traffic: S * row_bytes read, S * (H elements + 8*K bytes) written. Bound: memory.
#include "a2a_unpack_rows.h"

#include <torch/csrc/stable/library.h>

#include "../common/row_access.h"
#include "../common/tensors.h"
#include "fp8_block.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kPiecesPerLane = 4;
constexpr int kElementsPerLane = static_cast<int>(kScaleBlock) / kWarpSize;  // of one block

template <typename scalar_t>
struct UnpackArguments {
  const char* input;
  scalar_t* hidden;
  int32_t* ids;
  float* weights;
  int64_t num_rows, segments;
  PackedRow row;
};

template <typename scalar_t, int width>
__device__ void dequantise_segment(const char* bytes, int64_t segment, const PackedRow& row, scalar_t* output,
                                   int lane) {
  using Packed = Vector<scalar_t, width>;
  uint32_t words[kPiecesPerLane] = {};
  float scales[kPiecesPerLane] = {};
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t block = segment * kPiecesPerLane + piece;
    const int64_t at = block * kScaleBlock + lane * kElementsPerLane;
    if (at >= row.payload_bytes()) continue;
    words[piece] = *reinterpret_cast<const uint32_t*>(bytes + at);
    scales[piece] = reinterpret_cast<const float*>(bytes + row.scales_at)[block];
  }
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t first = (segment * kPiecesPerLane + piece) * kScaleBlock + lane * kElementsPerLane;
    float elements[kElementsPerLane];
#pragma unroll
    for (int i = 0; i < kElementsPerLane; i += 2) {
      const FloatPair pair = from_e4m3_pair(static_cast<uint16_t>(words[piece] >> (8 * i)));
      elements[i] = pair.low, elements[i + 1] = pair.high;
    }
#pragma unroll
    for (int i = 0; i < kElementsPerLane; i += width) {
      Packed values;
#pragma unroll
      for (int v = 0; v < width; ++v) values.values[v] = static_cast<scalar_t>(elements[i + v] * scales[piece]);
      if (first + i < row.hidden_size) store_whole(reinterpret_cast<Packed*>(output + first + i), values);
    }
  }
}

template <typename scalar_t, int width>
__device__ void copy_segment(const char* bytes, int64_t segment, const PackedRow& row, scalar_t* output, int lane) {
  constexpr int kFull = full_width<scalar_t>();
  using Packed = Vector<scalar_t, kFull>;
  using Part = Vector<scalar_t, width>;
  const int64_t first = segment * kPiecesPerLane * kWarpSize + lane;
  Packed vectors[kPiecesPerLane];
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t at = (first + piece * kWarpSize) * kVectorBytes;
    if (at < row.payload_bytes()) vectors[piece] = *reinterpret_cast<const Packed*>(bytes + at);
  }
#pragma unroll
  for (int piece = 0; piece < kPiecesPerLane; ++piece) {
    const int64_t element = (first + piece * kWarpSize) * kFull;
#pragma unroll
    for (int i = 0; i < kFull; i += width) {
      Part part;
#pragma unroll
      for (int v = 0; v < width; ++v) part.values[v] = vectors[piece].values[i + v];
      if (element + i < row.hidden_size) store_whole(reinterpret_cast<Part*>(output + element + i), part);
    }
  }
}

template <typename scalar_t, bool quantised, int width>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize) unpack_rows_kernel(UnpackArguments<scalar_t> arguments) {
  const PackedRow& row = arguments.row;
  const int lane = threadIdx.x % kWarpSize;
  // 64-bit divisions are calls on the device, which would cost the loop registers: there are none in it.
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  int64_t m = item / arguments.segments, segment = item - m * arguments.segments;
  const int64_t rows_on = stride / arguments.segments, segments_on = stride - rows_on * arguments.segments;
  const auto advance = [&] {
    m += rows_on, segment += segments_on;
    if (segment >= arguments.segments) segment -= arguments.segments, ++m;
  };
  for (; m < arguments.num_rows; advance()) {
    const char* bytes = arguments.input + m * row.row_bytes;
    scalar_t* output = arguments.hidden + m * row.hidden_size;
    if constexpr (quantised) {
      dequantise_segment<scalar_t, width>(bytes, segment, row, output, lane);
    } else {
      copy_segment<scalar_t, width>(bytes, segment, row, output, lane);
    }
    if (segment > 0) continue;
    for (int64_t j = lane; j < row.topk; j += kWarpSize) {
      arguments.ids[m * row.topk + j] = reinterpret_cast<const int32_t*>(bytes + row.ids_at)[j];
      if (row.weight_bytes > 0) {
        arguments.weights[m * row.topk + j] = reinterpret_cast<const float*>(bytes + row.weights_at)[j];
      }
    }
  }
}

template <typename scalar_t, bool quantised, int width>
void launch(const UnpackArguments<scalar_t>& arguments, const Tensor& like) {
  const int64_t items = arguments.num_rows * arguments.segments;
  launch_kernel(unpack_rows_kernel<scalar_t, quantised, width>,
                static_cast<unsigned>(std::min(ceil_div(items, kWarpsPerBlock), kMaxBlocks)),
                kWarpsPerBlock * kWarpSize, 0, current_stream(like), arguments);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> a2a_unpack_rows(const Tensor& rows, int64_t hidden_size, int64_t topk,
                                                   ScalarType dtype, std::string payload, bool weighted) {
  const PackedRow row = check_a2a_unpack_rows(rows, hidden_size, topk, dtype, payload, weighted);
  const DeviceGuard guard(rows.get_device_index());
  const int64_t num_rows = rows.size(0);
  const Tensor source = as_contiguous(rows);
  MOE_CHECK(reinterpret_cast<uintptr_t>(source.const_data_ptr()) % kRowBytesAlignment == 0,
            "rows: expected data aligned to 16 bytes");
  Tensor hidden = make_tensor(rows, {num_rows, hidden_size}, dtype);
  Tensor ids = make_tensor(rows, {num_rows, topk}, ScalarType::Int);
  Tensor weights = make_tensor(rows, {weighted ? num_rows : 0, topk}, router_dtype(dtype));
  if (num_rows == 0) return {hidden, ids, weights};
  const bool quantised = row.scales > 0;
  const int64_t segment_bytes = kPiecesPerLane * (quantised ? kScaleBlock : kWarpSize * kVectorBytes);
  dispatch_floating_cuda(dtype, "dtype", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const UnpackArguments<scalar_t> arguments = {static_cast<const char*>(source.const_data_ptr()),
                                                 hidden.mutable_data_ptr<scalar_t>(),
                                                 ids.mutable_data_ptr<int32_t>(),
                                                 weighted ? weights.mutable_data_ptr<float>() : nullptr,
                                                 num_rows,
                                                 ceil_div(row.payload_bytes(), segment_bytes),
                                                 row};
    constexpr int kFull = full_width<scalar_t>();
    const bool aligned = hidden_size % (quantised ? kElementsPerLane : kFull) == 0;
    if (quantised) {
      aligned ? launch<scalar_t, true, kElementsPerLane>(arguments, rows) : launch<scalar_t, true, 1>(arguments, rows);
    } else {
      aligned ? launch<scalar_t, false, kFull>(arguments, rows) : launch<scalar_t, false, 1>(arguments, rows);
    }
  });
  return {hidden, ids, weights};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("a2a_unpack_rows", TORCH_BOX(&moe_ext::cuda::a2a_unpack_rows));
}
