// Large CPU outputs on huge pages. Fresh memory comes from the kernel page by page: at 4 KiB a page the first write of
// a 512 MiB weight gradient spent 215 ms in page faults on the machine where this was measured, as much as the product.
#pragma once

#include <cstdint>

#include "checks.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace moe_ext {

constexpr uintptr_t kHugePageBytes = 2 << 20;

// Asks for huge pages under a tensor that has not been written yet; a wish, so whatever it answers is fine.
inline void prefer_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  if (bytes < 2 * kHugePageBytes) return;
  const auto start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (start + bytes) / kHugePageBytes * kHugePageBytes;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// torch::stable::new_empty on huge pages where it is large.
inline Tensor new_empty_large(const Tensor& like, std::initializer_list<int64_t> sizes,
                              std::optional<ScalarType> dtype = std::nullopt) {
  Tensor tensor = torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
  prefer_huge_pages(tensor);
  return tensor;
}

}  // namespace moe_ext
