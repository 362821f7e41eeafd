// mma.sync, cp.async and byte permutes on the CPU; fragment layouts as in the PTX ISA.
#pragma once

#include "cuda_emulator.h"

namespace moe_emulator {

// cp.async. Nothing arrives before the wait: until then the destination is poisoned, so that a read without a wait
// shows.
void copy_async(void* destination, const void* source, size_t bytes, bool inside);
void commit_copies();
void wait_for_copies(int pending);
// Bytes that cp.async has read since the library was loaded; for tests, through ctypes.
extern "C" __attribute__((visibility("default"))) uint64_t moe_emulator_copied_bytes();

// mma.sync.m16n8k16 with 16-bit factors and fp32 sums; all lanes of the warp must come.
template <typename T>
void multiply_16x8x16(float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  float rows[16][16], columns[8][16];
  const auto spread = [](uint32_t pair, float* two) {
    T values[2];
    std::memcpy(values, &pair, sizeof(pair));
    two[0] = static_cast<float>(values[0]);
    two[1] = static_cast<float>(values[1]);
  };
  for (int i = 0; i < 6; ++i) {
    const uint64_t* slots = exchange_value(kAllLanes, i < 4 ? a[i] : b[i - 4]);
    for (int source = 0; source < kWarpSize; ++source) {
      const int group = source / 4, member = source % 4;
      const auto pair = static_cast<uint32_t>(slots[source]);
      if (i < 4) {
        spread(pair, &rows[group + i % 2 * 8][2 * member + i / 2 * 8]);
      } else {
        spread(pair, &columns[group][2 * member + (i - 4) * 8]);
      }
    }
  }
  const int group = lane() / 4, member = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const float *row = rows[group + i / 2 * 8], *column = columns[2 * member + i % 2];
    for (int k = 0; k < 16; ++k) sums[i] += row[k] * column[k];
  }
}

}  // namespace moe_emulator

// Four of the eight bytes of (b, a), byte i of the result chosen by nibble i of `selector`.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
