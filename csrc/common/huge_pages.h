// Large CPU outputs on huge pages that are kept from one call to the next. Fresh memory comes from the kernel page by
// page, cleared: on the machine where this was measured the first write of a 512 MiB weight gradient spent 215 ms in
// page faults at 4 KiB a page, as much as the product; a permute of 64 MiB took 4.7 ms on fresh huge pages, 1.6 ms on
// kept ones. Kept and in use are together never more than was in use at once before, and what is kept is marked
// MADV_FREE: the kernel takes it back when memory is short.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "checks.h"
#include "poison.h"
#include "tensors.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
#define MOE_EXT_LARGE_BUFFERS
#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>
#endif

namespace moe_ext {

#ifdef MOE_EXT_LARGE_BUFFERS

constexpr size_t kHugePageBytes = 2 << 20;
constexpr size_t kLargeBytes = 2 * kHugePageBytes;  // smaller tensors are torch's own

struct LargeBuffer {
  void* data;  // null: no memory
  size_t bytes;
};

class LargeBuffers {
 public:
  // Lives as long as the process: tensors may be freed after static objects.
  static LargeBuffers& instance() {
    static auto* const buffers = new LargeBuffers;
    return *buffers;
  }

  LargeBuffer take(size_t bytes) {
    bytes = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    const size_t in_use = in_use_ += bytes;
    // Whoever finds the lock taken does without: nobody waits, and a fork meanwhile leaves nobody waiting.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      most_in_use_ = std::max(most_in_use_, in_use);
      const auto kept = std::find_if(kept_.rbegin(), kept_.rend(), [&](auto& buffer) { return buffer.bytes == bytes; });
      if (kept != kept_.rend()) {
        const LargeBuffer buffer = *kept;
        kept_.erase(std::next(kept).base());
        kept_bytes_ -= bytes;
        return buffer;
      }
      make_room();
    }
    const LargeBuffer buffer = map(bytes);
    if (!buffer.data) in_use_ -= bytes;
    return buffer;
  }

  void give_back(LargeBuffer buffer) {
    in_use_ -= buffer.bytes;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      munmap(buffer.data, buffer.bytes);
      return;
    }
    madvise(buffer.data, buffer.bytes, MADV_FREE);
    kept_.push_back(buffer);
    kept_bytes_ += buffer.bytes;
    make_room();
  }

 private:
  static LargeBuffer map(size_t bytes) {
    const size_t mapped = bytes + kHugePageBytes;
    void* const region = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region == MAP_FAILED) return {nullptr, 0};
    char* const start = static_cast<char*>(region);
    const size_t before = -reinterpret_cast<uintptr_t>(start) % kHugePageBytes;
    if (before) munmap(start, before);
    munmap(start + before + bytes, kHugePageBytes - before);
    madvise(start + before, bytes, MADV_HUGEPAGE);  // a wish: whatever it answers is fine
    return {start + before, bytes};
  }

  void make_room() {
    while (kept_bytes_ > 0 && kept_bytes_ + in_use_ > most_in_use_) {
      munmap(kept_.front().data, kept_.front().bytes);
      kept_bytes_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<LargeBuffer> kept_;  // oldest first
  size_t kept_bytes_ = 0, most_in_use_ = 0;
  std::atomic<size_t> in_use_ = 0;
};

// Freed by std::free. Null: no memory.
inline void* allocate_on_huge_pages(size_t bytes) {
  bytes = (bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  void* const data = std::aligned_alloc(kHugePageBytes, bytes);
  if (data) madvise(data, bytes, MADV_HUGEPAGE);  // a wish
  poison_if_asked(data, bytes, ScalarType::Byte);
  return data;
}

inline size_t bytes_of_element(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return 1;
    case ScalarType::Double: return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 4;
  }
}

#else

inline void* allocate_on_huge_pages(size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  void* const data = std::aligned_alloc(4096, bytes);
  poison_if_asked(data, bytes, ScalarType::Byte);
  return data;
}

#endif

// make_tensor of a floating or byte CPU tensor; where it is large, on huge pages that are kept.
inline Tensor new_empty_large(const Tensor& like, std::initializer_list<int64_t> sizes,
                              std::optional<ScalarType> dtype = std::nullopt) {
#ifdef MOE_EXT_LARGE_BUFFERS
  const ScalarType type = dtype.value_or(like.scalar_type());
  size_t bytes = bytes_of_element(type);
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes >= kLargeBytes) {
    if (const LargeBuffer buffer = LargeBuffers::instance().take(bytes); buffer.data) {
      poison_if_asked(buffer.data, bytes, type);
      std::vector<int64_t> strides(sizes.size(), 1);
      for (size_t axis = sizes.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * sizes.begin()[axis];
      return torch::stable::from_blob(buffer.data, {sizes.begin(), sizes.size()}, strides, like.device(), type,
                                      [buffer](void*) { LargeBuffers::instance().give_back(buffer); });
    }
  }
#endif
  return make_tensor(like, sizes, dtype);
}

}  // namespace moe_ext
