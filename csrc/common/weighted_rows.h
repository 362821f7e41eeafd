// Weighted sums of rows on the CPU, accumulated in fp32 in the order of the rows and rounded once.
#pragma once

#include <algorithm>

#include "cpu_parallel.h"
#include "dtypes.h"
#include "host_device.h"

namespace moe_ext::cpu {

// Columns at a time: a buffer that stays in L1.
constexpr int64_t kColumnBlock = 256;

template <typename scalar_t>
struct WeightedRow {
  const scalar_t* row;
  accumulate_t<scalar_t> weight;
};

// sums += weight * row, of four rows at once or of one. Plain loops over columns: they vectorise, conversions included.
template <typename scalar_t, typename acc_t>
MOE_HOST_DEVICE_INLINE void add_four(const WeightedRow<scalar_t>* rows, int64_t first, int64_t columns, acc_t* sums) {
  const scalar_t *a = rows[0].row + first, *b = rows[1].row + first;
  const scalar_t *c = rows[2].row + first, *d = rows[3].row + first;
  const acc_t of_a = rows[0].weight, of_b = rows[1].weight, of_c = rows[2].weight, of_d = rows[3].weight;
  for (int64_t i = 0; i < columns; ++i) {
    acc_t sum = sums[i] + of_a * static_cast<acc_t>(a[i]);
    sum += of_b * static_cast<acc_t>(b[i]);
    sum += of_c * static_cast<acc_t>(c[i]);
    sums[i] = sum + of_d * static_cast<acc_t>(d[i]);
  }
}

template <typename scalar_t, typename acc_t>
MOE_HOST_DEVICE_INLINE void add_one(const WeightedRow<scalar_t>& row, int64_t first, int64_t columns, acc_t* sums) {
  const scalar_t* a = row.row + first;
  const acc_t of_a = row.weight;
  for (int64_t i = 0; i < columns; ++i) sums[i] += of_a * static_cast<acc_t>(a[i]);
}

// output [width] = the weighted sum of the rows, added in their order.
template <typename scalar_t>
MOE_CPU_CLONES void sum_rows(const WeightedRow<scalar_t>* rows, int64_t count, int64_t width, scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t sums[kColumnBlock];
  for (int64_t first = 0; first < width; first += kColumnBlock) {
    const int64_t columns = std::min(kColumnBlock, width - first);
    for (int64_t i = 0; i < columns; ++i) sums[i] = 0;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) add_four(rows + j, first, columns, sums);
    for (; j < count; ++j) add_one(rows[j], first, columns, sums);
    for (int64_t i = 0; i < columns; ++i) output[first + i] = static_cast<scalar_t>(sums[i]);
  }
}

}  // namespace moe_ext::cpu
