// Splitting rows over threads on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

// Compiles a function for AVX-512 and AVX2 as well as for the baseline; the loader picks. For inner loops over rows.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(MOE_EXT_EMULATED)
#define MOE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOE_CPU_CLONES
#endif

namespace moe_ext {

// Below this many bytes of work a thread costs more to wake than it saves.
constexpr int64_t kBytesPerTask = 32 * 1024;

// body(begin, end) over disjoint row ranges; body must not throw. `bytes_per_row` is the traffic of one row.
template <typename Body>
void parallel_rows(int64_t num_rows, int64_t bytes_per_row, const Body& body) {
  if (num_rows <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_row));
  torch::stable::parallel_for(0, num_rows, grain, body);
}

}  // namespace moe_ext
