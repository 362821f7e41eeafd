// Division by a number the host knows, as a multiplication: the GPU has no instruction for an integer division.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace moe_ext {

// n / divisor for 0 <= n < 2^31, as n * factor >> (31 + shift). 2^shift is the least power of two >= divisor, factor =
// (2^(31 + shift) + e) / divisor with 0 <= e < divisor: it fits 32 bits. Before it is rounded down the result exceeds
// n / divisor by n * e / 2^(31 + shift) / divisor < 1 / divisor, too little to reach the next integer.
struct Divisor {
  uint32_t factor = 0;
  uint32_t shift = 0;

  MOE_HOST_DEVICE int divide(int n) const {
    return static_cast<int>(static_cast<uint32_t>(uint64_t{2 * static_cast<uint32_t>(n)} * factor >> 32) >> shift);
  }
};

// Of `divisor` >= 1; from 2^31 on every quotient is zero.
inline Divisor divisor_of(int64_t divisor) {
  const uint64_t bounded = std::min(divisor, int64_t{1} << 31);
  uint32_t shift = 0;
  while (uint64_t{1} << shift < bounded) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + bounded - 1) / bounded), shift};
}

}  // namespace moe_ext
