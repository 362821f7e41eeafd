// The instructions behind the small-rows kernel: mma.sync and cp.async of sm_80, griddepcontrol of sm_90. Compiled for
// the CPU, the first two are the functions of tests/emulation/sm80_emulator.h.
#pragma once

#include "../../common/cuda_launch.h"

#ifdef MOE_EXT_EMULATED
#include "sm80_emulator.h"
#endif

namespace moe_ext::small_rows {

using Word16 = Vector<uint32_t, 4>;

// sums [16 x 8] += a [16 x 16] b [16 x 8], fp32 sums. With lane = 4 * group + member, registers hold, two elements
// each,
//   a: (row group, k 2m..2m+1), (row group + 8, same k), (row group, k 2m+8..), (row group + 8, k 2m+8..)
//   b: (k 2m..2m+1, column group), (k 2m+8.., column group)
//   sums: (row group, columns 2m, 2m+1), (row group + 8, columns 2m, 2m+1)
template <typename T>
__device__ void multiply_16x8x16(float* sums, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef MOE_EXT_EMULATED
  moe_emulator::multiply_16x8x16<T>(sums, a, b);
#else
#define MOE_MMA(type)                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type             \
      ".f32"                                                             \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, BFloat16>) {
    MOE_MMA("bf16");
  } else {
    MOE_MMA("f16");
  }
#undef MOE_MMA
#endif
}

// Copies 16 bytes to shared memory past the registers and L1; zeros, and no read, unless `inside`. L2 fetches the whole
// 128-byte line: its other vectors are asked for next.
__device__ inline void copy_async(Word16* shared, const char* global, bool inside) {
#ifdef MOE_EXT_EMULATED
  moe_emulator::copy_async(shared, global, sizeof(Word16), inside);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
#endif
}

// Closes a group of copies.
__device__ inline void commit_copies() {
#ifdef MOE_EXT_EMULATED
  moe_emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` groups of this thread are under way. The copies are then visible to this thread, and
// to others after a barrier.
template <int pending>
__device__ void wait_for_copies() {
#ifdef MOE_EXT_EMULATED
  moe_emulator::wait_for_copies(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// A kernel launched with programmatic stream serialization starts before the one ahead of it in the stream has ended:
// nothing that another kernel writes may be read, and nothing written, before this returns.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel, if it waits in this way, be placed wherever there is room.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moe_ext::small_rows
