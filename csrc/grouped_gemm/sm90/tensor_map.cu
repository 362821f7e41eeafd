#include "tensor_map.h"

#ifndef MOE_EXT_EMULATED
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>

namespace moe_ext::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that the library links to no libcuda and loads without a driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kIntroducedIn = 12000;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kIntroducedIn, cudaEnableDefault, &found);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

const char* encode_tensor_map(TensorMap* map, const TensorMapSpec& spec) {
  static std::atomic<Encode> known{nullptr};  // once it has been found
  Encode encode = known;
  if (!encode) known = encode = find_encode();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled: CUDA 12 or later is needed";
  const CUtensorMapDataType type = spec.type == MapType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : spec.type == MapType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t element_bytes = spec.type == MapType::kFloat32 ? 4 : 2;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3], element_strides[3] = {1, 1, 1};
  for (int axis = 0; axis < spec.rank; ++axis) {
    sizes[axis] = spec.sizes[axis];
    box[axis] = spec.box[axis];
    if (axis > 0) strides[axis - 1] = spec.strides[axis] * element_bytes;
  }
  const CUresult result = encode(map, type, spec.rank, const_cast<void*>(spec.data), sizes, strides, box,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  thread_local char message[256];
  const bool deep = spec.rank > 2;
  std::snprintf(message, sizeof(message),
                "cuTensorMapEncodeTiled gave error %d for sizes (%lld, %lld, %lld), strides (%lld, %lld) bytes, box "
                "(%u, %u, %u), data at %p",
                static_cast<int>(result), static_cast<long long>(spec.sizes[0]), static_cast<long long>(spec.sizes[1]),
                deep ? static_cast<long long>(spec.sizes[2]) : 1, static_cast<long long>(strides[0]),
                deep ? static_cast<long long>(strides[1]) : 0, box[0], box[1], deep ? box[2] : 1, spec.data);
  return message;
}

}  // namespace moe_ext::sm90
#endif
