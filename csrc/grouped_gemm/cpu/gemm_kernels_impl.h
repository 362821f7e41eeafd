// See gemm_kernels.h. The including file defines MOE_ISA (a namespace), MOE_VECTOR_BYTES, MOE_STRIP_ROWS and, where
// there are bfloat16 dot products, MOE_BF16_DOT.
//
// multiply: strips of MOE_STRIP_ROWS rows times two vectors of columns stay in registers: with AVX-512 28 accumulators,
//   14 broadcasts and 2 loads for 28 multiply-adds. The right panel comes from L1 or L2, the left rows from L2.
// pack:     right lines along the inner dimension are transposed in registers, lanes x lanes at a time.
// dot:      up to 6 rows x 4 columns of accumulators along the inner dimension, straight from both factors; each line
//   of the right factor leaves memory once, fetched four lines ahead.
#include "gemm_kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace moe_ext::cpu::MOE_ISA {
namespace {

#define MOE_INLINE inline __attribute__((always_inline))

using uint16_t = std::uint16_t;

constexpr int kStripRows = MOE_STRIP_ROWS;
constexpr int kDotRowsAtOnce = 6;
constexpr int kDotColsAtOnce = 4;

template <typename T>
struct Simd {
  static constexpr int kLanes = MOE_VECTOR_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(MOE_VECTOR_BYTES)));
  typedef T Loose __attribute__((vector_size(MOE_VECTOR_BYTES), aligned(alignof(T)), may_alias));

  static MOE_INLINE Vec load(const void* from) { return *static_cast<const Loose*>(from); }
  static MOE_INLINE void store(void* to, Vec value) { *static_cast<Loose*>(to) = value; }
};

using Words = Simd<uint32_t>::Vec;
using Floats = Simd<float>::Vec;
constexpr int kLanes32 = Simd<float>::kLanes;
typedef uint16_t Halves __attribute__((vector_size(MOE_VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(MOE_VECTOR_BYTES / 2), aligned(2), may_alias));

MOE_INLINE Words load_halves(const void* from) {
  return __builtin_convertvector(static_cast<Halves>(*static_cast<const LooseHalves*>(from)), Words);
}

MOE_INLINE Floats widen_fp16(Words bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(__builtin_convertvector(bits, Halves))));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(__builtin_convertvector(bits, Halves))));
#else
  // The exponent is rebiased by a multiplication, which also normalises subnormals; infinity and NaN keep all ones.
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p112f;
  const Words special = reinterpret_cast<Words>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(scaled) | special | (bits & 0x8000u) << 16);
#endif
}

MOE_INLINE Words narrow_bf16(Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words nan = reinterpret_cast<Words>(value != value);
  return (rounded & ~nan) | (nan & (bits >> 16 | 0x40u));
}

MOE_INLINE Words select(Words mask, Words a, Words b) { return (mask & a) | (~mask & b); }

MOE_INLINE Words narrow_fp16(Floats value) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
  return __builtin_convertvector(reinterpret_cast<Halves>(bits), Words);
#elif defined(__F16C__)
  const __m128i bits = _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  return __builtin_convertvector(reinterpret_cast<Halves>(bits), Words);
#else
  const Words bits = reinterpret_cast<Words>(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 leaves the rounded value in the low bits. Normal ones: rebias, round to even.
  const Words small = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  Words result = select(reinterpret_cast<Words>(magnitude < 0x38800000u), small, normal);
  result = select(reinterpret_cast<Words>(magnitude >= 0x477ff000u), Words{} + 0x7c00u, result);
  result = select(reinterpret_cast<Words>(magnitude > 0x7f800000u), Words{} + 0x7e00u, result);
  return result | sign;
#endif
}

// What the factors are in memory and what a lane computes with. load(line, first) reads one vector of units.
struct Float32 {
  using Unit = float;
  using Sum = float;
  using Element = float;
  static constexpr int kPerUnit = 1;
  static MOE_INLINE Floats load(const char* from) { return Simd<float>::load(from); }
  static MOE_INLINE void store(char* to, Floats value) { Simd<float>::store(to, value); }
};

struct Float64 {
  using Unit = double;
  using Sum = double;
  using Element = double;
  static constexpr int kPerUnit = 1;
  static MOE_INLINE Simd<double>::Vec load(const char* from) { return Simd<double>::load(from); }
  static MOE_INLINE void store(char* to, Simd<double>::Vec value) { Simd<double>::store(to, value); }
};

MOE_INLINE void store_halves(char* to, Words bits) {
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(bits, Halves);
}

struct Float16 {
  using Unit = float;
  using Sum = float;
  using Element = uint16_t;
  static constexpr int kPerUnit = 1;
  static MOE_INLINE Floats load(const char* from) { return widen_fp16(load_halves(from)); }
  static MOE_INLINE void store(char* to, Floats value) { store_halves(to, narrow_fp16(value)); }
};

struct BFloat16 {
  using Unit = float;
  using Sum = float;
  using Element = uint16_t;
  static constexpr int kPerUnit = 1;
  static MOE_INLINE Floats load(const char* from) { return reinterpret_cast<Floats>(load_halves(from) << 16); }
  static MOE_INLINE void store(char* to, Floats value) { store_halves(to, narrow_bf16(value)); }
};

#ifdef MOE_BF16_DOT
struct BFloat16Pair {
  using Unit = uint32_t;
  using Sum = float;
  using Element = uint16_t;
  static constexpr int kPerUnit = 2;
  static MOE_INLINE Words load(const char* from) { return Simd<uint32_t>::load(from); }
};
#endif

template <typename Format>
using UnitVec = typename Simd<typename Format::Unit>::Vec;
template <typename Format>
using SumVec = typename Simd<typename Format::Sum>::Vec;
template <typename Format>
constexpr int kLanes = Simd<typename Format::Unit>::kLanes;
template <typename Format>
constexpr int kPanelCols = 2 * kLanes<Format>;

template <typename Format>
MOE_INLINE SumVec<Format> multiply_add(UnitVec<Format> a, UnitVec<Format> b, SumVec<Format> sum) {
#ifdef MOE_BF16_DOT
  if constexpr (Format::kPerUnit == 2) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                     reinterpret_cast<__m512bh>(b)));
  } else
#endif
  {
    return a * b + sum;
  }
}

template <typename T>
MOE_INLINE typename Simd<T>::Vec broadcast(T value) {
  return value - typename Simd<T>::Vec{};
}

MOE_INLINE void copy_bytes(char* to, const char* from, int64_t count) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(count));
}

// `count` elements, fewer than a vector's worth, and zeros after them.
template <typename Format>
MOE_INLINE UnitVec<Format> load_some(const char* from, int64_t count) {
  alignas(64) char padded[MOE_VECTOR_BYTES] = {};
  copy_bytes(padded, from, count * static_cast<int64_t>(sizeof(typename Format::Element)));
  return Format::load(padded);
}

// A vector of units of `line` from element `first` on, of which `count` exist.
template <typename Format>
MOE_INLINE UnitVec<Format> load_line(const char* line, int64_t first, int64_t count) {
  if (!line || count <= 0) return UnitVec<Format>{};
  const char* from = line + first * static_cast<int64_t>(sizeof(typename Format::Element));
  return count >= kLanes<Format> * Format::kPerUnit ? Format::load(from) : load_some<Format>(from, count);
}

MOE_INLINE Words load_wide(const char* line, int64_t first, int64_t count) {
  if (!line || count <= 0) return Words{};
  if (count >= kLanes32) return load_halves(line + 2 * first);
  alignas(64) char padded[MOE_VECTOR_BYTES / 2] = {};
  copy_bytes(padded, line + 2 * first, 2 * count);
  return load_halves(padded);
}

// The units of one step across the inner dimension: a line, or a pair of them interleaved.
template <typename Format>
MOE_INLINE UnitVec<Format> load_across(const char* const* lines, int64_t num_lines, int64_t step, int64_t first,
                                       int64_t count) {
  if constexpr (Format::kPerUnit == 1) {
    return load_line<Format>(lines[step], first, count);
  } else {
    const char* second = 2 * step + 1 < num_lines ? lines[2 * step + 1] : nullptr;
    return load_wide(lines[2 * step], first, count) | load_wide(second, first, count) << 16;
  }
}


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
void pack_left_inner(void* left, const char* const* rows, int64_t num_rows, int64_t first, int64_t count) {
  copy_lines<Format>(static_cast<typename Format::Unit*>(left), kLeftStride, rows, num_rows, first, count);
}

template <typename Format>
void pack_right_inner(void* right, const char* const* cols, int64_t num_cols, int64_t first, int64_t count) {
  using Unit = typename Format::Unit;
  constexpr int kCount = kLanes<Format>;
  constexpr int64_t kElements = kCount * Format::kPerUnit;
  auto* to = static_cast<Unit*>(right);
  UnitVec<Format> rows[kCount];
  for (int64_t i = 0; i < count; i += kElements) {
    for (int64_t col = 0; col < kPanelCols<Format>; col += kCount) {
      if (col + kCount <= num_cols && i + kElements <= count) {
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
        vectors[j] = step + j < steps
                         ? load_across<Format>(lines, num_lines, step + j, first_row + row, num_rows - row)
                         : UnitVec<Format>{};
      }
      // Rows past the last are written too: the block has room for whole vectors of rows.
      transpose<Unit>(vectors, to + row * kLeftStride + step, kLeftStride);
    }
  }
}

MOE_INLINE void fetch(const char* line) { __builtin_prefetch(line, 0, 2); }

template <typename Format, int kRows>
void multiply_strip(const typename Format::Unit* left, const typename Format::Unit* right, int64_t depth,
                    typename Format::Sum* sums, bool first, const char* const* wanted, int64_t num_wanted) {
  using Unit = typename Format::Unit;
  using Sum = typename Format::Sum;
  constexpr int kCount = kLanes<Format>;
  constexpr int64_t kChunk = 16;  // units between two rounds of fetching
  SumVec<Format> acc[kRows][2];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    acc[row][0] = first ? SumVec<Format>{} : Simd<Sum>::load(sums + row * 2 * kCount);
    acc[row][1] = first ? SumVec<Format>{} : Simd<Sum>::load(sums + row * 2 * kCount + kCount);
  }
  const int64_t chunks = depth / kChunk + 1, wanted_at_once = (num_wanted + chunks - 1) / chunks;
  for (int64_t start = 0; start < depth; start += kChunk) {
    for (int64_t i = 0; i < wanted_at_once && num_wanted > 0; ++i, --num_wanted) fetch(*wanted++);
    const int64_t end = start + kChunk < depth ? start + kChunk : depth;
    for (int64_t d = start; d < end; ++d) {
      const UnitVec<Format> right0 = Simd<Unit>::load(right + d * 2 * kCount);
      const UnitVec<Format> right1 = Simd<Unit>::load(right + d * 2 * kCount + kCount);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const UnitVec<Format> value = broadcast<Unit>(left[row * kLeftStride + d]);
        acc[row][0] = multiply_add<Format>(value, right0, acc[row][0]);
        acc[row][1] = multiply_add<Format>(value, right1, acc[row][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    Simd<Sum>::store(sums + row * 2 * kCount, acc[row][0]);
    Simd<Sum>::store(sums + row * 2 * kCount + kCount, acc[row][1]);
  }
}

template <typename Format>
using Strip = void (*)(const typename Format::Unit*, const typename Format::Unit*, int64_t, typename Format::Sum*, bool,
                       const char* const*, int64_t);

template <typename Format, int kRows>
constexpr Strip<Format> strip_of() {
  if constexpr (kRows <= kStripRows) return &multiply_strip<Format, kRows>;
  return nullptr;
}

template <typename Format>
void multiply(const void* left, const void* right, int64_t num_rows, int64_t depth, void* sums, bool first,
              const char* const* wanted, int64_t num_wanted) {
  static constexpr Strip<Format> kStrips[] = {
      strip_of<Format, 1>(),  strip_of<Format, 2>(),  strip_of<Format, 3>(),  strip_of<Format, 4>(),
      strip_of<Format, 5>(),  strip_of<Format, 6>(),  strip_of<Format, 7>(),  strip_of<Format, 8>(),
      strip_of<Format, 9>(),  strip_of<Format, 10>(), strip_of<Format, 11>(), strip_of<Format, 12>(),
      strip_of<Format, 13>(), strip_of<Format, 14>()};
  auto* units = static_cast<const typename Format::Unit*>(left);
  auto* to = static_cast<typename Format::Sum*>(sums);
  // Strips of nearly equal height: 64 rows are 13, 13, 13, 13, 12.
  for (int64_t strips = (num_rows + kStripRows - 1) / kStripRows; strips > 0; --strips) {
    const int64_t rows = (num_rows + strips - 1) / strips, fetched = (num_wanted + strips - 1) / strips;
    kStrips[rows - 1](units, static_cast<const typename Format::Unit*>(right), depth, to, first, wanted, fetched);
    units += rows * kLeftStride;
    to += rows * kPanelCols<Format>;
    num_rows -= rows;
    wanted += fetched;
    num_wanted -= fetched;
  }
}

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
      fetch(next[col] + k * kBytes);
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const UnitVec<Format> left = Format::load(rows[row] + k * kBytes);
#pragma GCC unroll 4
      for (int col = 0; col < kDotColsAtOnce; ++col) acc[row][col] = multiply_add<Format>(left, right[col], acc[row][col]);
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
      for (int col = 0; col < kDotColsAtOnce; ++col) acc[row][col] = multiply_add<Format>(left, right[col], acc[row][col]);
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
void dot(const char* const* rows, int64_t num_rows, const char* const* cols, int64_t num_cols, int64_t inner,
         void* sums, int64_t sums_stride) {
  static constexpr DotBlock<Format> kBlocks[] = {&dot_rows<Format, 1>, &dot_rows<Format, 2>, &dot_rows<Format, 3>,
                                                 &dot_rows<Format, 4>, &dot_rows<Format, 5>, &dot_rows<Format, 6>};
  auto* to = static_cast<typename Format::Sum*>(sums);
  const char *here[kDotColsAtOnce], *next[kDotColsAtOnce];
  for (int64_t col = 0; col < num_cols; col += kDotColsAtOnce) {
    for (int64_t i = 0; i < kDotColsAtOnce; ++i) {
      const int64_t ahead = col + kDotColsAtOnce + i;
      here[i] = cols[col + i < num_cols ? col + i : num_cols - 1];
      next[i] = cols[ahead < num_cols ? ahead : num_cols - 1];
    }
    int64_t row = 0;
    for (int64_t blocks = (num_rows + kDotRowsAtOnce - 1) / kDotRowsAtOnce; blocks > 0; --blocks) {
      const int64_t count = (num_rows - row + blocks - 1) / blocks;
      kBlocks[count - 1](rows + row, here, next, inner, to + row * sums_stride + col, sums_stride, num_cols - col);
      row += count;
    }
  }
}

// The bias is in the factors' dtype, one element for each column.
template <typename Format>
MOE_INLINE SumVec<Format> load_bias(const char* bias, int64_t col, int64_t count) {
  if constexpr (Format::kPerUnit == 2) {
    return reinterpret_cast<Floats>(load_wide(bias, col, count) << 16);
  } else {
    return load_line<Format>(bias, col, count);
  }
}

template <typename Format, typename Output>
void finish(const void* sums, int64_t sums_stride, int64_t num_rows, int64_t num_cols, const char* bias, char* output,
            int64_t output_stride_bytes, [[maybe_unused]] bool stream) {
  using Sum = typename Format::Sum;
  constexpr int kCount = Simd<Sum>::kLanes;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Output::Element));
  for (int64_t row = 0; row < num_rows; ++row) {
    const Sum* from = static_cast<const Sum*>(sums) + row * sums_stride;
    char* to = output + row * output_stride_bytes;
    for (int64_t col = 0; col < num_cols; col += kCount) {
      const int64_t count = num_cols - col < kCount ? num_cols - col : kCount;
      alignas(64) char padded[MOE_VECTOR_BYTES] = {};
      if (count < kCount) copy_bytes(padded, reinterpret_cast<const char*>(from + col), count * sizeof(Sum));
      SumVec<Format> value = Simd<Sum>::load(count < kCount ? padded : reinterpret_cast<const char*>(from + col));
      if (bias) value += load_bias<Format>(bias, col, count);
      if (count < kCount) {
        Output::store(padded, value);
        copy_bytes(to + col * kBytes, padded, count * kBytes);
        continue;
      }
#if defined(__AVX512F__)
      if constexpr (sizeof(typename Output::Element) == 4) {
        if (stream && reinterpret_cast<std::uintptr_t>(to + col * kBytes) % MOE_VECTOR_BYTES == 0) {
          _mm512_stream_ps(reinterpret_cast<float*>(to + col * kBytes), reinterpret_cast<__m512>(value));
          continue;
        }
      }
#endif
      Output::store(to + col * kBytes, value);
    }
  }
#if defined(__AVX512F__)
  if (stream) _mm_sfence();
#endif
}

template <typename Format, typename Output>
constexpr GemmKernels make_kernels() {
  using Unit = typename Format::Unit;
  static_assert(sizeof(Unit) == sizeof(typename Format::Sum) && kPanelCols<Format> <= kMaxPanelCols);
  return {sizeof(typename Format::Element),
          sizeof(typename Output::Element),
          sizeof(Unit),
          Format::kPerUnit,
          kPanelCols<Format>,
          &pack_left_inner<Format>,
          &pack_left_outer<Format>,
          &pack_right_inner<Format>,
          &pack_right_outer<Format>,
          &multiply<Format>,
          &dot<Format>,
          &finish<Format, Output>};
}

#ifdef MOE_BF16_DOT
using FastBFloat16 = BFloat16Pair;
#else
using FastBFloat16 = BFloat16;
#endif

constexpr GemmKernels kFloat32Kernels = make_kernels<Float32, Float32>();
constexpr GemmKernels kFloat64Kernels = make_kernels<Float64, Float64>();
constexpr GemmKernels kBFloat16Kernels[] = {make_kernels<FastBFloat16, BFloat16>(),
                                            make_kernels<FastBFloat16, Float32>()};
constexpr GemmKernels kFloat16Kernels[] = {make_kernels<Float16, Float16>(), make_kernels<Float16, Float32>()};

}  // namespace

const GemmKernels& gemm_kernels(GemmType type, bool wide) {
  switch (type) {
    case GemmType::kFloat64: return kFloat64Kernels;
    case GemmType::kBFloat16: return kBFloat16Kernels[wide];
    case GemmType::kFloat16: return kFloat16Kernels[wide];
    case GemmType::kFloat32: break;
  }
  return kFloat32Kernels;
}

}  // namespace moe_ext::cpu::MOE_ISA
