// Floats as unsigned integers of the same order: what selections and radix passes compare.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace moe_ext {

// NaN lies below everything.
MOE_HOST_DEVICE inline uint32_t ordered_key(float score) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace moe_ext
