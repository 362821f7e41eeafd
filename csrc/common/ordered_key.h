// Floats as unsigned integers of the same order: what selections and radix passes compare.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace moe_ext {

// NaN lies below everything.
MOE_HOST_DEVICE_INLINE uint32_t ordered_key(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

MOE_HOST_DEVICE_INLINE uint64_t ordered_key(double score) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  uint64_t bits;
  memcpy(&bits, &score, sizeof(bits));
  if ((bits & ~kSign) > 0x7ff0000000000000u) return 0;
  return bits & kSign ? ~bits : bits | kSign;
}

}  // namespace moe_ext
