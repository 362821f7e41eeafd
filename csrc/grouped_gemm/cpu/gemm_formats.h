// What factors are in memory and in registers, in the instruction set of the including file. See gemm_kernels_impl.h.
#pragma once

#include "gemm_kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace moe_ext::cpu::MOE_ISA {
namespace {

#define MOE_INLINE inline __attribute__((always_inline))

using uint16_t = std::uint16_t;

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

#if defined(__AVX512F__)
MOE_INLINE __m512i join_halves(Words low, Words high) {
  const auto half = [](Words bits) { return reinterpret_cast<__m256i>(__builtin_convertvector(bits, Halves)); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1);
}
#endif

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
  static MOE_INLINE Words narrow(Floats value) { return narrow_fp16(value); }
#if defined(__AVX512F__)
  static MOE_INLINE __m512i narrow_two(Floats low, Floats high) { return join_halves(narrow(low), narrow(high)); }
#endif
  static MOE_INLINE void store(char* to, Floats value) { store_halves(to, narrow(value)); }
};

struct BFloat16 {
  using Unit = float;
  using Sum = float;
  using Element = uint16_t;
  static constexpr int kPerUnit = 1;
  static MOE_INLINE Floats load(const char* from) { return reinterpret_cast<Floats>(load_halves(from) << 16); }
  static MOE_INLINE Words narrow(Floats value) { return narrow_bf16(value); }
#if defined(MOE_BF16_DOT)
  // Rounds like narrow_bf16, but flushes denormals, as the dot products before it do.
  static MOE_INLINE __m512i narrow_two(Floats low, Floats high) {
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
  }
#elif defined(__AVX512F__)
  static MOE_INLINE __m512i narrow_two(Floats low, Floats high) { return join_halves(narrow(low), narrow(high)); }
#endif
  static MOE_INLINE void store(char* to, Floats value) { store_halves(to, narrow(value)); }
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
// Whether its units are 32 bits that lie in memory as the multiply-adds take them.
template <typename Format>
constexpr bool kLiesInUnits =
    sizeof(typename Format::Unit) == 4 && sizeof(typename Format::Element) * Format::kPerUnit == 4;
template <typename Format>
constexpr int kPanelCols = 2 * kLanes<Format>;

template <typename Format>
MOE_INLINE SumVec<Format> multiply_add(UnitVec<Format> a, UnitVec<Format> b, SumVec<Format> sum) {
#ifdef MOE_BF16_DOT
  if constexpr (Format::kPerUnit == 2) {
    return reinterpret_cast<Floats>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
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

// One vector of elements as sums.
template <typename Format>
MOE_INLINE SumVec<Format> load_sums(const char* line, int64_t col, int64_t count) {
  if constexpr (Format::kPerUnit == 2) {
    return reinterpret_cast<Floats>(load_wide(line, col, count) << 16);
  } else {
    return load_line<Format>(line, col, count);
  }
}

#ifdef MOE_BF16_DOT
// Elements of two registers one after the other, the second's behind the first's 32: a[0] b[0] a[1] b[1] ...
struct PairOrder {
  alignas(64) uint16_t elements[2][32] = {};
  constexpr PairOrder() {
    for (int i = 0; i < 64; ++i) elements[i / 32][i % 32] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  }
};
#endif

// The same of kPerUnit whole vectors side by side; no line is null.
template <typename Format>
MOE_INLINE void load_block_across(const char* const* lines, int64_t num_lines, int64_t step, int64_t first,
                                  UnitVec<Format>* units) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));
  if constexpr (Format::kPerUnit == 1) {
    units[0] = Format::load(lines[step] + first * kBytes);
  } else {
#ifdef MOE_BF16_DOT
    alignas(64) static constexpr PairOrder kOrder = {};
    const auto even = reinterpret_cast<__m512i>(Format::load(lines[2 * step] + first * kBytes));
    const auto odd = 2 * step + 1 < num_lines
                         ? reinterpret_cast<__m512i>(Format::load(lines[2 * step + 1] + first * kBytes))
                         : _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half) {
      const __m512i order = _mm512_load_si512(kOrder.elements[half]);
      units[half] = reinterpret_cast<Words>(_mm512_permutex2var_epi16(even, order, odd));
    }
#endif
  }
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
