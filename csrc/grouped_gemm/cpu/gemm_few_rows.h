// Products of a few rows, straight from the right factor: each of its lines leaves memory once.
//   dot    lines along the inner dimension: up to 6 rows x 4 columns of accumulators, lines fetched four ahead
//   axpy   lines across it: eight steps of them side by side, swept from end to end, the next eight fetched meanwhile;
//          sums stay in L1, and each vector of weights meets all rows while it is in a register
#pragma once

#include "gemm_formats.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

constexpr int kDotRowsAtOnce = 6;
constexpr int kDotColsAtOnce = 4;

template <typename Vec>
MOE_INLINE auto sum_lanes(Vec vector) {
  auto sum = vector[0];
  for (unsigned i = 1; i < sizeof(Vec) / sizeof(sum); ++i) sum += vector[i];
  return sum;
}

template <typename Format, int kRows>
MOE_INLINE void dot_block(const char* const* rows, const char* const* cols, const char* const* next, int64_t inner,
                          typename Format::Sum* sums, int64_t stride, int64_t num_cols) {
  constexpr int64_t kElements = kLanes<Format> * Format::kPerUnit;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  SumVec<Format> acc[kRows][kDotColsAtOnce] = {};
  int64_t k = 0;
  for (; k + kElements <= inner; k += kElements) {
    UnitVec<Format> right[kDotColsAtOnce];
#pragma GCC unroll 4
    for (int col = 0; col < kDotColsAtOnce; ++col) {
      right[col] = Format::load(cols[col] + k * kBytes);
      __builtin_prefetch(next[col] + k * kBytes, 0, 2);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const UnitVec<Format> left = Format::load(rows[row] + k * kBytes);
#pragma GCC unroll 4
      for (int col = 0; col < kDotColsAtOnce; ++col)
        acc[row][col] = multiply_add<Format>(left, right[col], acc[row][col]);
    }
  }
  if (k < inner) {
    UnitVec<Format> right[kDotColsAtOnce];
#pragma GCC unroll 4
    for (int col = 0; col < kDotColsAtOnce; ++col) right[col] = load_some<Format>(cols[col] + k * kBytes, inner - k);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const UnitVec<Format> left = load_some<Format>(rows[row] + k * kBytes, inner - k);
#pragma GCC unroll 4
      for (int col = 0; col < kDotColsAtOnce; ++col)
        acc[row][col] = multiply_add<Format>(left, right[col], acc[row][col]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int col = 0; col < kDotColsAtOnce; ++col) {
      if (col < num_cols) sums[row * stride + col] = sum_lanes(acc[row][col]);
    }
  }
}

template <typename Format>
using DotBlock = void (*)(const char* const*, const char* const*, const char* const*, int64_t, typename Format::Sum*,
                          int64_t, int64_t);

template <typename Format, int kRows>
void dot_rows(const char* const* rows, const char* const* cols, const char* const* next, int64_t inner,
              typename Format::Sum* sums, int64_t stride, int64_t num_cols) {
  dot_block<Format, kRows>(rows, cols, next, inner, sums, stride, num_cols);
}

template <typename Format>
void dot(const char* const* rows, int64_t num_rows, const char* const* cols, int64_t num_cols, int64_t num_given,
         int64_t inner, void* sums, int64_t sums_stride) {
  static constexpr DotBlock<Format> kBlocks[] = {&dot_rows<Format, 1>, &dot_rows<Format, 2>, &dot_rows<Format, 3>,
                                                 &dot_rows<Format, 4>, &dot_rows<Format, 5>, &dot_rows<Format, 6>};
  auto* to = static_cast<typename Format::Sum*>(sums);
  const char *here[kDotColsAtOnce], *next[kDotColsAtOnce];
  for (int64_t col = 0; col < num_cols; col += kDotColsAtOnce) {
    for (int64_t i = 0; i < kDotColsAtOnce; ++i) {
      const int64_t ahead = col + kDotColsAtOnce + i;
      here[i] = cols[col + i < num_cols ? col + i : num_cols - 1];
      next[i] = cols[ahead < num_given ? ahead : num_given - 1];
    }
    int64_t row = 0;
    for (int64_t blocks = (num_rows + kDotRowsAtOnce - 1) / kDotRowsAtOnce; blocks > 0; --blocks) {
      const int64_t count = (num_rows - row + blocks - 1) / blocks;
      kBlocks[count - 1](rows + row, here, next, inner, to + row * sums_stride + col, sums_stride, num_cols - col);
      row += count;
    }
  }
}

constexpr int kAxpySteps = 8;

// sums [num_rows] of one vector of columns += left @ kSteps steps of lines; only the first `count` columns exist.
template <typename Format, int kSteps, bool kPartial>
MOE_INLINE void axpy_vector(const typename Format::Unit* left, int64_t num_rows, const char* const* lines,
                            int64_t num_lines, int64_t step, int64_t first_col, int64_t count,
                            typename Format::Sum* sums, int64_t stride, bool first) {
  using Sum = typename Format::Sum;
  UnitVec<Format> right[kSteps];
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) right[s] = load_across<Format>(lines, num_lines, step + s, first_col, count);
  for (int64_t row = 0; row < num_rows; ++row) {
    Sum* to = sums + row * stride;
    alignas(64) Sum padded[kLanes<Format>] = {};
    if (kPartial && !first)
      copy_bytes(reinterpret_cast<char*>(padded), reinterpret_cast<const char*>(to), count * sizeof(Sum));
    SumVec<Format> acc = first ? SumVec<Format>{} : Simd<Sum>::load(kPartial ? padded : to);
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
      acc = multiply_add<Format>(broadcast<typename Format::Unit>(left[row * kLeftStride + step + s]), right[s], acc);
    }
    Simd<Sum>::store(kPartial ? padded : to, acc);
    if (kPartial) copy_bytes(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(padded), count * sizeof(Sum));
  }
}

template <typename Format, int kSteps>
void axpy_lines(const typename Format::Unit* left, int64_t num_rows, const char* const* lines, int64_t num_lines,
                int64_t step, int64_t first_col, int64_t num_cols, typename Format::Sum* sums, int64_t stride,
                bool first) {
  constexpr int kCount = kLanes<Format>;
  constexpr int kLines = kSteps * Format::kPerUnit;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  const char* next[kLines];
  for (int i = 0; i < kLines; ++i) {
    const int64_t line = step * Format::kPerUnit + kLines + i;
    next[i] = lines[line < num_lines ? line : num_lines - 1] + first_col * kBytes;
  }
  int64_t col = 0;
  for (; col + kCount <= num_cols; col += kCount) {
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next[i] + col * kBytes, 0, 2);
    axpy_vector<Format, kSteps, false>(left, num_rows, lines, num_lines, step, first_col + col, kCount, sums + col,
                                       stride, first);
  }
  if (col < num_cols) {
    axpy_vector<Format, kSteps, true>(left, num_rows, lines, num_lines, step, first_col + col, num_cols - col,
                                      sums + col, stride, first);
  }
}

template <typename Format>
void axpy(const void* left, int64_t num_rows, const char* const* lines, int64_t num_lines, int64_t first_col,
          int64_t num_cols, void* sums, int64_t sums_stride, bool first) {
  auto* units = static_cast<const typename Format::Unit*>(left);
  auto* to = static_cast<typename Format::Sum*>(sums);
  const int64_t steps = (num_lines + Format::kPerUnit - 1) / Format::kPerUnit;
  int64_t step = 0;
  for (; step + kAxpySteps <= steps; step += kAxpySteps, first = false) {
    axpy_lines<Format, kAxpySteps>(units, num_rows, lines, num_lines, step, first_col, num_cols, to, sums_stride,
                                   first);
  }
  for (; step < steps; ++step, first = false) {
    axpy_lines<Format, 1>(units, num_rows, lines, num_lines, step, first_col, num_cols, to, sums_stride, first);
  }
  for (int64_t row = 0; first && row < num_rows; ++row) {  // a product over nothing
    for (int64_t col = 0; col < num_cols; ++col) to[row * sums_stride + col] = 0;
  }
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
