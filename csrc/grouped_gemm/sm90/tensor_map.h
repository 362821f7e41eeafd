// Tensor maps: what TMA knows about a matrix in device memory. Made on the host, once per operand and launch, and
// handed to the kernel by value, so that a captured graph carries them.
#pragma once

#include <cstdint>

#ifdef MOE_EXT_EMULATED
#include "hopper_emulator.h"
#else
#include <cuda.h>
namespace moe_ext::sm90 {
using TensorMap = CUtensorMap;
}
#endif

namespace moe_ext::sm90 {

enum class MapType { kBFloat16, kFloat16, kFloat32 };

// Up to three axes, the contiguous one first. A box is `box` elements along each axis, 128 bytes along the first, and
// lies in shared memory as rows of 128 swizzled bytes. What a box reads outside the sizes is zero; what it would write
// there is dropped.
struct TensorMapSpec {
  const void* data;
  MapType type;
  int rank;
  int64_t sizes[3];
  int64_t strides[3];  // in elements; the first is 1
  int box[3];
};

// nullptr, or what went wrong.
const char* encode_tensor_map(TensorMap* map, const TensorMapSpec& spec);

}  // namespace moe_ext::sm90
