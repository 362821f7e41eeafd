// Products of a few rows, straight from the right factor: each of its lines leaves memory once.
//   dot    lines along the inner dimension: up to 6 rows x 4 columns of accumulators, lines fetched four ahead
//   axpy   lines across it: up to 6 rows x 4 vectors of columns, lines fetched 16 ahead
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

constexpr int kAxpyRowsAtOnce = 6;
constexpr int64_t kAxpyAhead = 16;  // steps

// sums [kRows][kVectors vectors] (+)= left @ lines, of whose vectors only the first `count` columns exist if kPartial.
template <typename Format, int kRows, int kVectors, bool kPartial>
void axpy_block(const typename Format::Unit* left, const char* const* lines, int64_t num_lines, int64_t first_col,
                int64_t next_col, int64_t count, typename Format::Sum* sums, int64_t stride, bool first) {
  using Unit = typename Format::Unit;
  using Sum = typename Format::Sum;
  constexpr int kCount = kLanes<Format>;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  constexpr int64_t kLineBytes = kVectors * kCount * kBytes;
  alignas(64) Sum padded[kRows][kCount] = {};
  SumVec<Format> acc[kRows][kVectors] = {};
  if (!first) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      if constexpr (kPartial) {
        for (int64_t c = 0; c < count; ++c) padded[row][c] = sums[row * stride + c];
        acc[row][0] = Simd<Sum>::load(padded[row]);
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[row][v] = Simd<Sum>::load(sums + row * stride + v * kCount);
      }
    }
  }
  const int64_t steps = (num_lines + Format::kPerUnit - 1) / Format::kPerUnit;
  for (int64_t step = 0; step < steps; ++step) {
    // Past the last line come the next columns of the first lines.
    const bool wraps = step + kAxpyAhead >= steps;
    const int64_t ahead = wraps ? step + kAxpyAhead - steps : step + kAxpyAhead;
    if (!kPartial && ahead < steps) {
#pragma GCC unroll 2
      for (int i = 0; i < Format::kPerUnit; ++i) {
        const int64_t line = ahead * Format::kPerUnit + i < num_lines ? ahead * Format::kPerUnit + i : num_lines - 1;
        const char* from = lines[line] + (wraps ? next_col : first_col) * kBytes;
#pragma GCC unroll 8
        for (int64_t byte = 0; byte < kLineBytes; byte += 64) __builtin_prefetch(from + byte, 0, 3);
      }
    }
    UnitVec<Format> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      right[v] = load_across<Format>(lines, num_lines, step, first_col + v * kCount, kPartial ? count : kCount);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const UnitVec<Format> value = broadcast<Unit>(left[row * kLeftStride + step]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[row][v] = multiply_add<Format>(value, right[v], acc[row][v]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    if constexpr (kPartial) {
      Simd<Sum>::store(padded[row], acc[row][0]);
      for (int64_t c = 0; c < count; ++c) sums[row * stride + c] = padded[row][c];
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) Simd<Sum>::store(sums + row * stride + v * kCount, acc[row][v]);
    }
  }
}

template <typename Format, int kRows>
void axpy_rows(const typename Format::Unit* left, const char* const* lines, int64_t num_lines, int64_t first_col,
               int64_t num_cols, typename Format::Sum* sums, int64_t stride, bool first) {
  constexpr int kCount = kLanes<Format>;
  constexpr int kVectors = MOE_STRIP_ROWS < 14 ? 2 : kRows <= 2 ? 8 : 4;  // 16 registers or 32
  int64_t col = 0;
  for (; col + kVectors * kCount <= num_cols; col += kVectors * kCount) {
    const int64_t next = col + 2 * kVectors * kCount <= num_cols ? col + kVectors * kCount : col;
    axpy_block<Format, kRows, kVectors, false>(left, lines, num_lines, first_col + col, first_col + next, kCount,
                                               sums + col, stride, first);
  }
  for (; col < num_cols; col += kCount) {
    const int64_t count = num_cols - col < kCount ? num_cols - col : kCount;
    axpy_block<Format, kRows, 1, true>(left, lines, num_lines, first_col + col, 0, count, sums + col, stride, first);
  }
}

template <typename Format>
using AxpyRows = void (*)(const typename Format::Unit*, const char* const*, int64_t, int64_t, int64_t,
                          typename Format::Sum*, int64_t, bool);

template <typename Format>
void axpy(const void* left, int64_t num_rows, const char* const* lines, int64_t num_lines, int64_t first_col,
          int64_t num_cols, void* sums, int64_t sums_stride, bool first) {
  static constexpr AxpyRows<Format> kRows[] = {&axpy_rows<Format, 1>, &axpy_rows<Format, 2>, &axpy_rows<Format, 3>,
                                               &axpy_rows<Format, 4>, &axpy_rows<Format, 5>, &axpy_rows<Format, 6>};
  auto* units = static_cast<const typename Format::Unit*>(left);
  auto* to = static_cast<typename Format::Sum*>(sums);
  for (int64_t blocks = (num_rows + kAxpyRowsAtOnce - 1) / kAxpyRowsAtOnce; blocks > 0; --blocks) {
    const int64_t rows = (num_rows + blocks - 1) / blocks;
    kRows[rows - 1](units, lines, num_lines, first_col, num_cols, to, sums_stride, first);
    units += rows * kLeftStride;
    to += rows * sums_stride;
    num_rows -= rows;
  }
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
