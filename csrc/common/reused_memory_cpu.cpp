#include "reused_memory.h"

#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <vector>

#include "huge_pages.h"

namespace moe_ext::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)
namespace {

constexpr uintptr_t kReusedBytes = 32 << 20;

struct Block {
  void* memory;
  uintptr_t bytes;
};

class Blocks {
 public:
  void* take(uintptr_t bytes) {
    const std::lock_guard guard(mutex_);
    for (size_t i = 0; i < free_.size(); ++i) {
      if (free_[i].bytes != bytes) continue;
      void* memory = free_[i].memory;
      free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(i));
      return memory;
    }
    for (const Block& block : free_) munmap(block.memory, block.bytes);
    free_.clear();
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MOE_CHECK(memory != MAP_FAILED, "out of memory: ", bytes, " bytes for a weight gradient");
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
  }

  void give_back(const Block& block) {
    madvise(block.memory, block.bytes, MADV_FREE);
    const std::lock_guard guard(mutex_);
    free_.push_back(block);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
};

// Never destroyed: tensors may outlive the static objects of this library.
Blocks& blocks() {
  static auto* const instance = new Blocks;
  return *instance;
}

}  // namespace

Tensor new_empty_reused(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size() - 1; axis > 0; --axis) {
    strides[axis - 1] = strides[axis] * std::max<int64_t>(1, sizes.begin()[axis]);
  }
  const auto element = static_cast<uintptr_t>(dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
  const uintptr_t wanted = static_cast<uintptr_t>(strides[0] * *sizes.begin()) * element;
  if (wanted < kReusedBytes) return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
  const uintptr_t bytes = (wanted + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const Block block = {blocks().take(bytes), bytes};
  return torch::stable::from_blob(block.memory, {sizes.begin(), sizes.size()}, {strides.data(), strides.size()},
                                  like.device(), dtype, [block](void*) { blocks().give_back(block); });
}
#else
Tensor new_empty_reused(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_empty_large(like, sizes, dtype);
}
#endif

}  // namespace moe_ext::cpu
