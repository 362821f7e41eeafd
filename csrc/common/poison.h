// MOE_EXT_POISON=1, for tests: memory without values holds NaN, or the largest integer, so that an element that no
// kernel writes shows. On the CPU torch.utils.deterministic.fill_uninitialized_memory does not reach what make_tensor
// makes.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "checks.h"

namespace moe_ext {

inline bool poisons_memory() {
  static const bool asked_for = [] {
    const char* const value = std::getenv("MOE_EXT_POISON");
    return value && std::string_view(value) == "1";
  }();
  return asked_for;
}

// All bits set is NaN in every floating dtype. `data` may be null.
inline void poison_if_asked(void* data, size_t bytes, ScalarType dtype) {
  if (!poisons_memory() || !data || bytes == 0) return;
  std::memset(data, 0xff, bytes);
  const size_t size = dtype == ScalarType::Int ? 4 : dtype == ScalarType::Long ? 8 : 0;
  if (!size) return;
  // -1 would pass for an entry that is not there.
  for (size_t last = size - 1; last < bytes; last += size) static_cast<unsigned char*>(data)[last] = 0x7f;
}

}  // namespace moe_ext
