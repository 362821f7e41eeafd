// Packing of factors into blocks of units: copies, widening, and transposes in registers, lanes x lanes at a time.
#pragma once

#include "gemm_formats.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

#if defined(__AVX512F__)
MOE_INLINE void transpose_16x16(const __m512* rows, void* to, int64_t stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  // b[4g + c]: columns c, c + 4, c + 8, c + 12 (a 128-bit lane each) of rows 4g .. 4g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xee);
    auto* unit = static_cast<float*>(to);
    _mm512_storeu_ps(unit + c * stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(unit + (c + 4) * stride, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(unit + (c + 8) * stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(unit + (c + 12) * stride, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}
#elif defined(__AVX2__)
MOE_INLINE void transpose_8x8(const __m256* rows, void* to, int64_t stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    auto* unit = static_cast<float*>(to);
    _mm256_storeu_ps(unit + c * stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x20));
    _mm256_storeu_ps(unit + (c + 4) * stride, _mm256_permute2f128_ps(b[c], b[4 + c], 0x31));
  }
}
#endif

// Transposes lanes x lanes units: row i of the result is written to to[i * stride].
template <typename Unit>
MOE_INLINE void transpose(const typename Simd<Unit>::Vec* rows, Unit* to, int64_t stride) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Unit) == 4) return transpose_16x16(reinterpret_cast<const __m512*>(rows), to, stride);
#elif defined(__AVX2__)
  if constexpr (sizeof(Unit) == 4) return transpose_8x8(reinterpret_cast<const __m256*>(rows), to, stride);
#endif
  for (int i = 0; i < Simd<Unit>::kLanes; ++i) {
    for (int j = 0; j < Simd<Unit>::kLanes; ++j) to[i * stride + j] = rows[j][i];
  }
}

// Rows of units, each `count` elements of a line: to[line][unit].
template <typename Format>
MOE_INLINE void copy_lines(typename Format::Unit* to, int64_t stride, const char* const* lines, int64_t num_lines,
                           int64_t first, int64_t count) {
  using Unit = typename Format::Unit;
  constexpr int64_t kElements = kLanes<Format> * Format::kPerUnit;
  for (int64_t line = 0; line < num_lines; ++line) {
    for (int64_t i = 0; i < count; i += kElements) {
      // The last vector may run past the depth of the block, into the padding of the row.
      Simd<Unit>::store(to + line * stride + i / Format::kPerUnit,
                        load_line<Format>(lines[line], first + i, count - i));
    }
  }
}

template <typename Format>
void pack_left_inner(void* left, int64_t stride, const char* const* rows, int64_t num_rows, int64_t first,
                     int64_t count) {
  copy_lines<Format>(static_cast<typename Format::Unit*>(left), stride, rows, num_rows, first, count);
}

template <typename Format>
void pack_right_inner(void* right, const char* const* cols, int64_t num_cols, int64_t first, int64_t count) {
  using Unit = typename Format::Unit;
  constexpr int kCount = kLanes<Format>;
  constexpr int64_t kElements = kCount * Format::kPerUnit;
  auto* to = static_cast<Unit*>(right);
  UnitVec<Format> rows[kCount];
  // One vector's worth of columns from end to end: lines a power of two apart crowd a set of the cache.
  for (int64_t col = 0; col < kPanelCols<Format>; col += kCount) {
    bool whole = col + kCount <= num_cols;
    for (int j = 0; whole && j < kCount; ++j) whole = cols[col + j] != nullptr;
    for (int64_t i = 0; i < count; i += kElements) {
      if (whole && i + kElements <= count) {
        const int64_t offset = (first + i) * static_cast<int64_t>(sizeof(typename Format::Element));
#pragma GCC unroll 16
        for (int j = 0; j < kCount; ++j) rows[j] = Format::load(cols[col + j] + offset);
      } else {
        for (int j = 0; j < kCount; ++j) {
          rows[j] = load_line<Format>(col + j < num_cols ? cols[col + j] : nullptr, first + i, count - i);
        }
      }
      transpose<Unit>(rows, to + i / Format::kPerUnit * kPanelCols<Format> + col, kPanelCols<Format>);
    }
  }
}

template <typename Format>
void pack_right_outer(void* right, const char* const* lines, int64_t num_lines, int64_t first_col, int64_t num_cols) {
  using Unit = typename Format::Unit;
  constexpr int kCount = kLanes<Format>;
  auto* to = static_cast<Unit*>(right);
  for (int64_t step = 0; step * Format::kPerUnit < num_lines; ++step) {
    for (int64_t col = 0; col < kPanelCols<Format>; col += kCount) {
      Simd<Unit>::store(to + step * kPanelCols<Format> + col,
                        load_across<Format>(lines, num_lines, step, first_col + col, num_cols - col));
    }
  }
}

template <typename Format>
void pack_left_outer(void* left, const char* const* lines, int64_t num_lines, int64_t first_row, int64_t num_rows) {
  using Unit = typename Format::Unit;
  constexpr int kCount = kLanes<Format>;
  auto* to = static_cast<Unit*>(left);
  const int64_t steps = (num_lines + Format::kPerUnit - 1) / Format::kPerUnit;
  UnitVec<Format> vectors[kCount];
  for (int64_t step = 0; step < steps; step += kCount) {
    for (int64_t row = 0; row < num_rows; row += kCount) {
      for (int j = 0; j < kCount; ++j) {
        vectors[j] = step + j < steps ? load_across<Format>(lines, num_lines, step + j, first_row + row, num_rows - row)
                                      : UnitVec<Format>{};
      }
      // Rows past the last are written too: the block has room for whole vectors of rows.
      transpose<Unit>(vectors, to + row * kLeftStride + step, kLeftStride);
    }
  }
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
