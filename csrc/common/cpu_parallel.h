// Splitting rows over threads on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

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
