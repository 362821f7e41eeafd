// Products that read the right factor in place: each of its lines leaves memory once, and none is packed.
//   dot    lines along the inner dimension: up to 4 rows meet columns one after the other, more rows 4 or 6 columns
//   side
//          by side, with 7 rows x 4 or 4 x 6 accumulators; lanes are summed at the end
//   axpy   lines across it, a few rows: eight steps of them side by side, swept from end to end, the next eight fetched
//          meanwhile, or one step where that reads memory as it lies; sums stay in L1, and each vector of weights meets
//          all rows while it is in a register
#pragma once

#include "gemm_formats.h"
#include "gemm_strips.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

// Rows and columns whose accumulators, with a vector of each column beside them, fill the registers.
struct DotShape {
  int rows, cols, sum_cols;  // sum_cols are summed and written together
};
// Many rows take what of them lies in L2 once for each block of columns.
constexpr DotShape kDotFew = MOE_VECTOR_BYTES == 64 ? DotShape{7, 4, 4} : DotShape{4, 3, 4};
constexpr DotShape kDotMany = MOE_VECTOR_BYTES == 64 ? DotShape{4, 6, 8} : DotShape{4, 3, 4};

// Up to so many rows, in so many bytes, stay in L1 while columns pass by one after the other. A core reads fastest
// then: what lies in one stretch the hardware fetches ahead, and to fetch more than where a column begins slows it
// down.
constexpr int kDotLinesRows = 4;
constexpr int64_t kDotLinesBytes = 16384;
constexpr int64_t kCacheLinesAhead = 2;

// The sums of kLanes vectors, of which the first kCount are not zeros: result[i] that of vectors[i]. Every vector's
// lanes are summed in the same order.
template <typename Sum, int kCount>
MOE_INLINE typename Simd<Sum>::Vec sum_lanes(const typename Simd<Sum>::Vec* vectors) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Sum) == 4) {
    __m512 b[4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < (kCount + 3) / 4; ++i) {
      __m512 a[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const auto even = reinterpret_cast<__m512>(vectors[4 * i + 2 * j]);
        const auto odd = reinterpret_cast<__m512>(vectors[4 * i + 2 * j + 1]);
        a[j] = _mm512_unpacklo_ps(even, odd) + _mm512_unpackhi_ps(even, odd);
      }
      b[i] = _mm512_shuffle_ps(a[0], a[1], 0x44) + _mm512_shuffle_ps(a[0], a[1], 0xee);
    }
    const __m512 low = _mm512_shuffle_f32x4(b[0], b[1], 0x44) + _mm512_shuffle_f32x4(b[0], b[1], 0xee);
    const __m512 high =
        kCount > 8 ? _mm512_shuffle_f32x4(b[2], b[3], 0x44) + _mm512_shuffle_f32x4(b[2], b[3], 0xee) : __m512{};
    return reinterpret_cast<Floats>(_mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Sum) == 4) {
    __m256 a[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto even = reinterpret_cast<__m256>(vectors[2 * i]), odd = reinterpret_cast<__m256>(vectors[2 * i + 1]);
      a[i] = _mm256_unpacklo_ps(even, odd) + _mm256_unpackhi_ps(even, odd);
    }
    const __m256 low = _mm256_shuffle_ps(a[0], a[1], 0x44) + _mm256_shuffle_ps(a[0], a[1], 0xee);
    const __m256 high = _mm256_shuffle_ps(a[2], a[3], 0x44) + _mm256_shuffle_ps(a[2], a[3], 0xee);
    return reinterpret_cast<Floats>(_mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31));
  }
#endif
  typename Simd<Sum>::Vec sums = {};
  for (int i = 0; i < Simd<Sum>::kLanes; ++i) {
    Sum sum = vectors[i][0];
    for (int lane = 1; lane < Simd<Sum>::kLanes; ++lane) sum += vectors[i][lane];
    sums[i] = sum;
  }
  return sums;
}

// One column from end to end: the sums of kRows rows, a vector of each, `stride` apart.
template <typename Format, int kRows>
MOE_INLINE void dot_line(const typename Format::Unit* rows, int64_t row_stride, const char* column, int64_t count,
                         typename Format::Sum* sums, int64_t stride) {
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;  // of additions that do not wait for each other
  constexpr int64_t kElements = kLanes<Format> * Format::kPerUnit;
  constexpr auto kVector = kElements * static_cast<int64_t>(sizeof(typename Format::Element));
  SumVec<Format> acc[kChains][kRows] = {};
  const auto add = [&](int chain, const UnitVec<Format>& right, int64_t vector) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const UnitVec<Format> left = Simd<typename Format::Unit>::load(rows + row * row_stride + vector * kLanes<Format>);
      acc[chain][row] = multiply_add<Format>(left, right, acc[chain][row]);
    }
  };
  const int64_t whole = count / kElements;
  int64_t v = 0;
  for (; v + kChains <= whole; v += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) add(chain, Format::load(column + (v + chain) * kVector), v + chain);
  }
  for (; v < whole; ++v) add(0, Format::load(column + v * kVector), v);
  if (whole * kElements < count) add(0, load_some<Format>(column + whole * kVector, count - whole * kElements), whole);
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    SumVec<Format> sum = acc[0][row];
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) sum += acc[chain][row];
    Simd<typename Format::Sum>::store(sums + row * stride, sum);
  }
}

// All columns one after the other, their lanes summed for as many as fill a vector.
template <typename Format, int kRows>
void dot_lines(const typename Format::Unit* rows, int64_t row_stride, const char* const* cols, int64_t num_cols,
               int64_t first, int64_t count, typename Format::Sum* sums, int64_t sums_stride, bool first_block,
               const Fetch& after) {
  using Sum = typename Format::Sum;
  constexpr int kLane = kLanes<Format>, kCols = kRows > 2 ? (kLane + 3) / 4 : kLane / kRows;
  constexpr int kVectors = (kRows * kCols + kLane - 1) / kLane * kLane;
  typedef Sum Loose __attribute__((vector_size(kCols * sizeof(Sum)), aligned(alignof(Sum)), may_alias));
  const int64_t first_byte = first * static_cast<int64_t>(sizeof(typename Format::Element));
  alignas(64) Sum lanes[kVectors * kLane] = {}, summed[kVectors];
  for (int64_t col = 0; col < num_cols; col += kCols) {
    for (int64_t c = 0; c < kCols && col + c < num_cols; ++c) {
      const char* const* column = cols + col + c;
      const bool last = col + c + 1 == num_cols;
      if (!last || after.num_lines > 0) {
        const char* next = last ? after.lines[0] + after.first_byte : column[1] + first_byte;
        for (int64_t i = 0; i < kCacheLinesAhead; ++i) __builtin_prefetch(next + i * kCacheLine, 0, 3);
      }
      dot_line<Format, kRows>(rows, row_stride, *column + first_byte, count, lanes + c * kLane, kCols * kLane);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += kLane) {
      SumVec<Format> vectors[kLane];
#pragma GCC unroll 16
      for (int j = 0; j < kLane; ++j) vectors[j] = Simd<Sum>::load(lanes + (i + j) * kLane);
      Simd<Sum>::store(summed + i, sum_lanes<Sum, kLane>(vectors));
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {  // past the last column an earlier one's sums, which the next overwrites
      auto* to = reinterpret_cast<Loose*>(sums + row * sums_stride + col);
      const Loose value = *reinterpret_cast<const Loose*>(summed + row * kCols);
      *to = first_block ? value : *to + value;
    }
  }
}

template <typename Format>
constexpr decltype(&dot_lines<Format, 1>) kDotLines[kDotLinesRows + 1] = {
    nullptr, &dot_lines<Format, 1>, &dot_lines<Format, 2>, &dot_lines<Format, 3>, &dot_lines<Format, 4>};

// Cache lines [line, end) of the next columns, counted through one column after the other, that a block of rows
// fetches: in that order memory and the translation of addresses answer soonest.
template <int kCols>
struct DotFetch {
  const char* cols[kCols];
  int64_t lines;  // of a column
  int64_t line, end;
};

// One vector of the inner dimension; unless kWhole, it is the columns' last, of `count` elements.
template <typename Format, int kRows, DotShape kShape, bool kWhole>
MOE_INLINE void dot_step(const typename Format::Unit* rows, int64_t row_stride, const char* const* cols, int64_t offset,
                         int64_t count, SumVec<Format>* acc) {
  UnitVec<Format> right[kShape.cols];
#pragma GCC unroll 8
  for (int col = 0; col < kShape.cols; ++col) {
    right[col] = kWhole ? Format::load(cols[col] + offset) : load_some<Format>(cols[col] + offset, count);
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    const UnitVec<Format> left = Simd<typename Format::Unit>::load(rows + row * row_stride);
#pragma GCC unroll 8
    for (int col = 0; col < kShape.cols; ++col) {
      SumVec<Format>& sum = acc[row * kShape.sum_cols + col];
      sum = multiply_add<Format>(left, right[col], sum);
    }
  }
}

// Columns side by side from end to end. Each step fetches kFetched lines of `wanted` from `line` on: to fetch costs an
// instruction, to keep account of it would cost more.
template <typename Format, int kRows, DotShape kShape, int kFetched>
MOE_INLINE void dot_side(const typename Format::Unit* rows, int64_t row_stride, const char* const* cols, int64_t count,
                         const DotFetch<kShape.cols>& wanted, SumVec<Format>* acc) {
  constexpr int64_t kElements = kLanes<Format> * Format::kPerUnit;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  const int64_t whole = count / kElements * kElements;
  int64_t k = 0, line = wanted.line;
  while (line < wanted.end && k < whole) {
    const int64_t col = line / wanted.lines, first = line - col * wanted.lines;
    const int64_t left = wanted.end - line, here = wanted.lines - first < left ? wanted.lines - first : left;
    const int64_t steps = (here + kFetched - 1) / kFetched, room = (whole - k) / kElements;
    const char* from = wanted.cols[col] + first * kCacheLine;
    for (const int64_t end = k + (steps < room ? steps : room) * kElements; k < end; k += kElements) {
#pragma GCC unroll 8
      for (int i = 0; i < kFetched; ++i) __builtin_prefetch(from + i * kCacheLine, 0, 3);
      from += kFetched * kCacheLine;
      dot_step<Format, kRows, kShape, true>(rows, row_stride, cols, k * kBytes, 0, acc);
      rows += kLanes<Format>;
    }
    line += steps <= room ? here : room * kFetched;
  }
  for (; k < whole; k += kElements, rows += kLanes<Format>) {
    dot_step<Format, kRows, kShape, true>(rows, row_stride, cols, k * kBytes, 0, acc);
  }
  if (k < count) {
    dot_step<Format, kRows, kShape, false>(rows, row_stride, cols, k * kBytes, count - k, acc);
  }
}

// `rows` are packed units, zeros up to a whole vector; `cols` elements, `count` of them.
template <typename Format, int kRows, DotShape kShape, int kFetched>
void dot_block(const typename Format::Unit* rows, int64_t row_stride, const char* const* cols, int64_t count,
               typename Format::Sum* sums, int64_t sums_stride, bool first, const DotFetch<kShape.cols>& wanted) {
  using Sum = typename Format::Sum;
  constexpr int kLane = kLanes<Format>, kCols = kShape.cols, kSumCols = kShape.sum_cols;
  constexpr int kUsed = kRows * kSumCols, kVectors = (kUsed + kLane - 1) / kLane * kLane;
  // Sums past the last column: zeros, which the next block overwrites; later -0, which changes nothing there.
  const SumVec<Format> nothing = broadcast<Sum>(first ? Sum(0) : -Sum(0));
  SumVec<Format> acc[kVectors];
#pragma GCC unroll 32
  for (int i = 0; i < kVectors; ++i) acc[i] = i % kSumCols < kCols ? SumVec<Format>{} : nothing;
  dot_side<Format, kRows, kShape, kFetched>(rows, row_stride, cols, count, wanted, acc);
  typedef Sum Loose __attribute__((vector_size(kSumCols * sizeof(Sum)), aligned(alignof(Sum)), may_alias));
  alignas(64) Sum summed[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i += kLane) {
    constexpr int kLast = kUsed - (kVectors - kLane);
    const bool last = i + kLane >= kVectors;
    Simd<Sum>::store(summed + i, last ? sum_lanes<Sum, kLast>(acc + i) : sum_lanes<Sum, kLane>(acc + i));
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    auto* to = reinterpret_cast<Loose*>(sums + row * sums_stride);
    const Loose value = *reinterpret_cast<const Loose*>(summed + row * kSumCols);
    *to = first ? value : *to + value;
  }
}

template <typename Format, int kCols>
using DotBlock = void (*)(const typename Format::Unit*, int64_t, const char* const*, int64_t, typename Format::Sum*,
                          int64_t, bool, const DotFetch<kCols>&);

// The blocks of 1 to kShape.rows rows.
template <typename Format, DotShape kShape, int kFetched>
struct DotBlocks {
  DotBlock<Format, kShape.cols> of_rows[kShape.rows + 1] = {};

  constexpr DotBlocks() { fill<kShape.rows>(); }

 private:
  template <int kCount>
  constexpr void fill() {
    of_rows[kCount] = &dot_block<Format, kCount, kShape, kFetched>;
    if constexpr (kCount > 1) fill<kCount - 1>();
  }
};

template <typename Format, DotShape kShape, int kFetched = kShape.cols>
constexpr DotBlocks<Format, kShape, kFetched> kDotBlocks = {};

// All columns: `blocks` of rows pass over a few of them, and share the lines of the next few to fetch.
template <typename Format, int kCols>
void dot_columns(const DotBlock<Format, kCols>* of_rows, int64_t blocks, const typename Format::Unit* rows,
                 int64_t row_stride, int64_t num_rows, const char* const* cols, int64_t num_cols, int64_t first,
                 int64_t count, typename Format::Sum* sums, int64_t sums_stride, bool first_block, const Fetch& after) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  for (int64_t col = 0; col < num_cols; col += kCols) {
    const char* here[kCols];
    for (int64_t i = 0; i < kCols; ++i) {
      here[i] = cols[col + i < num_cols ? col + i : num_cols - 1] + first * kBytes;
    }
    const bool more = col + kCols < num_cols;
    const int64_t left = more ? num_cols - col - kCols : after.num_lines;
    DotFetch<kCols> wanted = {};
    wanted.lines = ((more ? count * kBytes : after.bytes) + kCacheLine - 1) / kCacheLine;
    for (int64_t i = 0; left > 0 && i < kCols; ++i) {
      const int64_t ahead = i < left ? i : left - 1;
      wanted.cols[i] = more ? cols[col + kCols + ahead] + first * kBytes : after.lines[ahead] + after.first_byte;
    }
    const int64_t lines = left > 0 ? kCols * wanted.lines : 0;
    int64_t row = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t height = (num_rows - row + blocks - block - 1) / (blocks - block);
      wanted.line = block * lines / blocks, wanted.end = (block + 1) * lines / blocks;
      of_rows[height](rows + row * row_stride, row_stride, here, count, sums + row * sums_stride + col, sums_stride,
                      first_block, wanted);
      row += height;
    }
  }
}

template <typename Format>
void dot(const void* packed_rows, int64_t row_stride, int64_t num_rows, const char* const* cols, int64_t num_cols,
         int64_t first, int64_t count, void* all_sums, int64_t sums_stride, bool first_block, const Fetch& after) {
  const auto* rows = static_cast<const typename Format::Unit*>(packed_rows);
  auto* sums = static_cast<typename Format::Sum*>(all_sums);
  const int64_t row_bytes = count / Format::kPerUnit * static_cast<int64_t>(sizeof(typename Format::Unit));
  if (num_rows == 1 || (num_rows <= kDotLinesRows && num_rows * row_bytes <= kDotLinesBytes)) {
    return kDotLines<Format>[num_rows](rows, row_stride, cols, num_cols, first, count, sums, sums_stride, first_block,
                                       after);
  }
  const auto run = [&](auto* of_rows, int64_t blocks) {
    dot_columns<Format>(of_rows, blocks, rows, row_stride, num_rows, cols, num_cols, first, count, sums, sums_stride,
                        first_block, after);
  };
  if (num_rows <= kDotFew.rows) return run(kDotBlocks<Format, kDotFew>.of_rows, 1);
  const int64_t blocks = (num_rows + kDotMany.rows - 1) / kDotMany.rows;
  constexpr int kHalf = (kDotMany.cols + 1) / 2, kThird = (kDotMany.cols + 2) / 3;
  run(blocks == 2              ? kDotBlocks<Format, kDotMany, kHalf>.of_rows
      : blocks < kDotMany.cols ? kDotBlocks<Format, kDotMany, kThird>.of_rows
                               : kDotBlocks<Format, kDotMany, 1>.of_rows,
      blocks);
}

constexpr int kAxpySteps = 8;
// Up to so many rows, with so many bytes of sums, take lines that follow each other in memory one step after the other.
constexpr int kAxpyLinesRows = 4;
constexpr int64_t kAxpyLinesBytes = 32768;

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

// The same of kPerUnit whole vectors of columns: as many as lie side by side in a line's register.
template <typename Format, int kSteps>
MOE_INLINE void axpy_block(const typename Format::Unit* left, int64_t num_rows, const char* const* lines,
                           int64_t num_lines, int64_t step, int64_t first_col, typename Format::Sum* sums,
                           int64_t stride, bool first) {
  using Sum = typename Format::Sum;
  constexpr int kVectors = Format::kPerUnit;
  UnitVec<Format> right[kSteps][kVectors];
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s) load_block_across<Format>(lines, num_lines, step + s, first_col, right[s]);
  for (int64_t row = 0; row < num_rows; ++row) {
    Sum* to = sums + row * stride;
    SumVec<Format> acc[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[v] = first ? SumVec<Format>{} : Simd<Sum>::load(to + v * kLanes<Format>);
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
      const UnitVec<Format> factor = broadcast<typename Format::Unit>(left[row * kLeftStride + step + s]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[v] = multiply_add<Format>(factor, right[s][v], acc[v]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) Simd<Sum>::store(to + v * kLanes<Format>, acc[v]);
  }
}

// The same for one step and all whole blocks of columns: factors stay in registers, and little stands between one line
// of memory and the next. How many columns that are.
template <typename Format, int kRows, bool kFirst>
MOE_INLINE int64_t axpy_step(const typename Format::Unit* left, const char* const* lines, int64_t first_byte,
                             int64_t num_cols, typename Format::Sum* sums, int64_t stride, const char* const* next) {
  using Sum = typename Format::Sum;
  constexpr int kVectors = Format::kPerUnit, kBlock = kLanes<Format> * kVectors;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  const char *here[kVectors], *fetched[kVectors];
#pragma GCC unroll 2
  for (int i = 0; i < kVectors; ++i) here[i] = lines[i] + first_byte, fetched[i] = next[i];
  UnitVec<Format> factors[kRows];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) factors[row] = broadcast<typename Format::Unit>(left[row * kLeftStride]);
  int64_t col = 0;
  for (; col + kBlock <= num_cols; col += kBlock) {
    UnitVec<Format> right[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) __builtin_prefetch(fetched[i] + col * kBytes, 0, 3);
    load_block_across<Format>(here, kVectors, 0, col, right);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        Sum* to = sums + row * stride + col + v * kLanes<Format>;
        const SumVec<Format> before = kFirst ? SumVec<Format>{} : Simd<Sum>::load(to);
        Simd<Sum>::store(to, multiply_add<Format>(factors[row], right[v], before));
      }
    }
  }
  return col;
}

template <typename Format, int kRows = kAxpyLinesRows>
int64_t axpy_step(const typename Format::Unit* left, int64_t num_rows, const char* const* lines, int64_t first_byte,
                  int64_t num_cols, typename Format::Sum* sums, int64_t stride, bool first, const char* const* next) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return axpy_step<Format, kRows - 1>(left, num_rows, lines, first_byte, num_cols, sums, stride, first, next);
    }
  }
  return first ? axpy_step<Format, kRows, true>(left, lines, first_byte, num_cols, sums, stride, next)
               : axpy_step<Format, kRows, false>(left, lines, first_byte, num_cols, sums, stride, next);
}

// `next` are where the lines begin that are fetched meanwhile, kSteps steps of them.
template <typename Format, int kSteps>
void axpy_lines(const typename Format::Unit* left, int64_t num_rows, const char* const* lines, int64_t num_lines,
                int64_t step, int64_t first_col, int64_t num_cols, typename Format::Sum* sums, int64_t stride,
                bool first, const char* const* next, bool in_registers) {
  constexpr int kCount = kLanes<Format>, kBlock = kCount * Format::kPerUnit;
  constexpr int kLines = kSteps * Format::kPerUnit;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  int64_t col = 0;
  if (kSteps == 1 && in_registers && (step + 1) * Format::kPerUnit <= num_lines) {
    col = axpy_step<Format>(left + step, num_rows, lines + step * Format::kPerUnit, first_col * kBytes, num_cols, sums,
                            stride, first, next);
  }
  for (; col + kBlock <= num_cols; col += kBlock) {
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next[i] + col * kBytes, 0, 2);
    axpy_block<Format, kSteps>(left, num_rows, lines, num_lines, step, first_col + col, sums + col, stride, first);
  }
  for (; col + kCount <= num_cols; col += kCount) {
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
          int64_t num_cols, void* sums, int64_t sums_stride, bool first, const Fetch& after) {
  constexpr int kLines = kAxpySteps * Format::kPerUnit;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  auto* units = static_cast<const typename Format::Unit*>(left);
  auto* to = static_cast<typename Format::Sum*>(sums);
  const int64_t steps = (num_lines + Format::kPerUnit - 1) / Format::kPerUnit;
  int64_t step = 0;
  const char* next[kLines];
  // Lines past the last are the first of `after`.
  const auto find_next = [&](int64_t ahead_steps) {
    int64_t line = (step + ahead_steps) * Format::kPerUnit;
    for (int64_t i = 0; i < ahead_steps * Format::kPerUnit; ++i, ++line) {
      const bool here = line < num_lines || after.num_lines == 0;
      const int64_t ahead = line - num_lines < after.num_lines ? line - num_lines : after.num_lines - 1;
      next[i] = here ? lines[line < num_lines ? line : num_lines - 1] + first_col * kBytes
                     : after.lines[ahead] + after.first_byte;
    }
  };
  const bool in_order = num_lines > 1 && lines[1] - lines[0] == num_cols * kBytes && num_rows <= kAxpyLinesRows &&
                        num_rows * num_cols * static_cast<int64_t>(sizeof(typename Format::Sum)) <= kAxpyLinesBytes;
  for (; !in_order && step + kAxpySteps <= steps; step += kAxpySteps, first = false) {
    find_next(kAxpySteps);
    axpy_lines<Format, kAxpySteps>(units, num_rows, lines, num_lines, step, first_col, num_cols, to, sums_stride, first,
                                   next, false);
  }
  for (; step < steps; ++step, first = false) {
    find_next(1);
    axpy_lines<Format, 1>(units, num_rows, lines, num_lines, step, first_col, num_cols, to, sums_stride, first, next,
                          in_order);
  }
  for (int64_t row = 0; first && row < num_rows; ++row) {  // a product over nothing
    for (int64_t col = 0; col < num_cols; ++col) to[row * sums_stride + col] = 0;
  }
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
