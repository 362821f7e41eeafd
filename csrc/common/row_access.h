// How kernels that move whole rows read, write and cut them.
#pragma once

#include "cuda_launch.h"

namespace moe_ext {

// Reads what this kernel reads once: past L1, so that what is read again stays there. No store of the same kernel may
// touch it. Stores have no such twin: the next kernel reads what this one wrote, from L2 where it fits.
template <typename scalar_t, int width>
__device__ Vector<scalar_t, width> load_once(const Vector<scalar_t, width>* source) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(Vector<scalar_t, width>) == kVectorBytes) {
    union {
      uint32_t words[4];
      Vector<scalar_t, width> vector;
    } result = {};
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(result.words[0]), "=r"(result.words[1]), "=r"(result.words[2]), "=r"(result.words[3])
        : "l"(source));
    return result.vector;
  }
#endif
  return *source;
}

// A store of the whole vector at once, which the compiler may not take apart into its elements.
template <typename scalar_t, int width>
__device__ void store_whole(Vector<scalar_t, width>* to, const Vector<scalar_t, width>& vector) {
#ifdef __CUDA_ARCH__
  constexpr size_t kBytes = sizeof(vector);
  if constexpr (kBytes == 16 || kBytes == 8) {
    uint32_t words[kBytes / 4];
    __builtin_memcpy(words, &vector, kBytes);
    if constexpr (kBytes == 16) {
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    } else {
      asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(words[0]), "r"(words[1]) : "memory");
    }
    return;
  }
#endif
  *to = vector;
}

// One warp per item (a row, or what makes up a row), which walks the segments of the row. Where items are too few to
// fill the machine, the segments are spread over the y dimension.
struct RowGrid {
  dim3 blocks;
  int64_t row_vectors;
  int segments;

  static constexpr int64_t kWavesPerGrid = 4;  // several, so that the hardware evens out blocks of unequal length

  RowGrid(const Tensor& like, int64_t items, int64_t row_vectors, int64_t segment_vectors, int warps_per_block,
          int64_t resident_warps)
      : row_vectors(row_vectors), segments(static_cast<int>(ceil_div(row_vectors, segment_vectors))) {
    const int64_t resident = resident_warps * multiprocessor_count(like);
    const int64_t x = std::min(ceil_div(items, warps_per_block), ceil_div(kWavesPerGrid * resident, warps_per_block));
    const int64_t y = std::max<int64_t>(
        std::min<int64_t>({resident / std::max<int64_t>(items, 1), static_cast<int64_t>(segments), 65535}), 1);
    blocks = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
  }
  bool empty() const { return blocks.x == 0 || segments == 0; }
};

}  // namespace moe_ext
