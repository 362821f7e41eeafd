// multiply: strips of MOE_STRIP_ROWS rows times two vectors of columns stay in registers. With AVX-512 these are 28
// accumulators, and 14 broadcasts and 2 loads feed 28 multiply-adds: the two load ports are busy 8 cycles of the 28.
// A right panel (256 x 32 units, 32 KiB) streams from L1 or L2 for each strip, a strip's left rows (14 KiB) stay in L1.
// The last block of the inner dimension writes the output from the registers: a strip's row there is one or two whole
// cache lines, which leave without having been read.
#pragma once

#include "gemm_ahead.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

constexpr int kStripRows = MOE_STRIP_ROWS;

#if defined(__AVX512F__)
using Bits = __m512i;
MOE_INLINE void stream_vector(char* to, Bits bits) { _mm512_stream_si512(reinterpret_cast<Bits*>(to), bits); }
#elif defined(__AVX2__)
using Bits = __m256i;
MOE_INLINE void stream_vector(char* to, Bits bits) { _mm256_stream_si256(reinterpret_cast<Bits*>(to), bits); }
#endif

// Whether a panel's row of outputs is whole cache lines, in whole registers.
template <typename Output>
constexpr bool kStreams =
    MOE_VECTOR_BYTES >= 32 && 2 * Simd<typename Output::Sum>::kLanes * sizeof(typename Output::Element) % 64 == 0;

// A panel's row, two vectors of sums, to the output.
template <typename Output, typename Vec>
MOE_INLINE void write_row(char* to, Vec low, Vec high, [[maybe_unused]] bool stream) {
  constexpr int kBytes = MOE_VECTOR_BYTES / sizeof(typename Output::Sum) * sizeof(typename Output::Element);
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Output::Element) == 2) {
    const __m512i line = Output::narrow_two(low, high);
    return stream ? stream_vector(to, line) : _mm512_storeu_si512(to, line);
  }
#endif
#if defined(__AVX2__)
  if constexpr (kStreams<Output>) {
    if (stream) {
      stream_vector(to, reinterpret_cast<Bits>(low));
      return stream_vector(to + kBytes, reinterpret_cast<Bits>(high));
    }
  }
#endif
  Output::store(to, low);
  Output::store(to + kBytes, high);
}

template <typename Format, typename Output, int kRows>
MOE_INLINE void write_rows(SumVec<Format> (&sums)[kRows][2], const PanelOutput& output) {
  constexpr int kCount = kLanes<Format>;
  if (output.bias) {
    const SumVec<Format> low = load_sums<Format>(output.bias, 0, kCount);
    const SumVec<Format> high = load_sums<Format>(output.bias, kCount, kCount);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][0] += low, sums[row][1] += high;
  }
  char* to = output.data;
  if (output.stream) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row, to += output.stride_bytes) {
      write_row<Output>(to, sums[row][0], sums[row][1], true);
    }
  } else {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row, to += output.stride_bytes) {
      write_row<Output>(to, sums[row][0], sums[row][1], false);
    }
  }
}

template <typename Format, typename Output, typename Aside, int kRows>
void multiply_strip(const typename Format::Unit* left, const typename Format::Unit* right, int64_t depth,
                    typename Format::Sum* sums, bool first, const PanelOutput& output, Aside& aside) {
  using Unit = typename Format::Unit;
  using Sum = typename Format::Sum;
  constexpr int kCount = kLanes<Format>;
  SumVec<Format> acc[kRows][2];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    acc[row][0] = first ? SumVec<Format>{} : Simd<Sum>::load(sums + row * 2 * kCount);
    acc[row][1] = first ? SumVec<Format>{} : Simd<Sum>::load(sums + row * 2 * kCount + kCount);
  }
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    const UnitVec<Format> right0 = Simd<Unit>::load(right + d * 2 * kCount);
    const UnitVec<Format> right1 = Simd<Unit>::load(right + d * 2 * kCount + kCount);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const UnitVec<Format> value = broadcast<Unit>(left[row * kLeftStride + d]);
      acc[row][0] = multiply_add<Format>(value, right0, acc[row][0]);
      acc[row][1] = multiply_add<Format>(value, right1, acc[row][1]);
    }
  };
  for (int64_t d = 0; d < depth;) {
    aside.some();
    const int64_t end = d + aside.chunk < depth ? d + aside.chunk : depth;
    for (; d + Aside::kUnrolled <= end; d += Aside::kUnrolled) {
#pragma GCC unroll 4
      for (int i = 0; i < Aside::kUnrolled; ++i) step(d + i);
    }
    if constexpr (Aside::kUnrolled > 1) {
      for (; d < end; ++d) step(d);
    }
  }
  if (output.data) return write_rows<Format, Output>(acc, output);
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    Simd<Sum>::store(sums + row * 2 * kCount, acc[row][0]);
    Simd<Sum>::store(sums + row * 2 * kCount + kCount, acc[row][1]);
  }
}

template <typename Format, typename Aside>
using Strip = void (*)(const typename Format::Unit*, const typename Format::Unit*, int64_t, typename Format::Sum*, bool,
                       const PanelOutput&, Aside&);

// The strips of 1 to kStripRows rows.
template <typename Format, typename Output, typename Aside>
struct Strips {
  Strip<Format, Aside> of_rows[kStripRows + 1] = {};

  constexpr Strips() { fill<kStripRows>(); }

 private:
  template <int kRows>
  constexpr void fill() {
    of_rows[kRows] = &multiply_strip<Format, Output, Aside, kRows>;
    if constexpr (kRows > 1) fill<kRows - 1>();
  }
};

template <typename Format, typename Output, typename Aside>
void multiply_strips(const void* left, const void* right, int64_t num_rows, int64_t depth, void* sums, bool first,
                     const PanelOutput& output, const Ahead& ahead) {
  static constexpr Strips<Format, Output, Aside> kStrips = {};
  auto* units = static_cast<const typename Format::Unit*>(left);
  auto* to = static_cast<typename Format::Sum*>(sums);
  PanelOutput out = output;
  out.stream = output.stream && kStreams<Output> && reinterpret_cast<std::uintptr_t>(output.data) % kCacheLine == 0 &&
               output.stride_bytes % kCacheLine == 0;
  int64_t strips = (num_rows + kStripRows - 1) / kStripRows;
  Aside aside(ahead, strips, depth);
  // Strips of nearly equal height: 64 rows are 13, 13, 13, 13, 12.
  for (; strips > 0; --strips) {
    const int64_t rows = (num_rows + strips - 1) / strips;
    kStrips.of_rows[rows](units, static_cast<const typename Format::Unit*>(right), depth, to, first, out, aside);
    if (out.data) out.data += rows * out.stride_bytes;
    units += rows * kLeftStride;
    to += rows * kPanelCols<Format>;
    num_rows -= rows;
  }
  aside.rest();
}

template <typename Format, typename Output>
void multiply(const void* left, const void* right, int64_t num_rows, int64_t depth, void* sums, bool first,
              const PanelOutput& output, const Ahead& ahead) {
  const auto run = [&](auto* strips) { strips(left, right, num_rows, depth, sums, first, output, ahead); };
#if defined(__AVX512F__)
  if constexpr (kPacksAhead<Format>) {
    if (ahead.right && ahead.inner) return run(&multiply_strips<Format, Output, PackInner<Format>>);
    if (ahead.right) return run(&multiply_strips<Format, Output, PackOuter<Format>>);
  }
#endif
  run(&multiply_strips<Format, Output, FetchOnly>);
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
