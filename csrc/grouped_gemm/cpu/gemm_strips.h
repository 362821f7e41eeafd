// multiply: strips of MOE_STRIP_ROWS rows times two vectors of columns stay in registers. With AVX-512 these are 28
// accumulators, and 14 broadcasts and 2 loads feed 28 multiply-adds: the two load ports are busy 8 cycles of the 28.
// A right panel (256 x 32 units, 32 KiB) streams from L1 or L2 for each strip, a strip's left rows (14 KiB) stay in L1.
// The last block of the inner dimension writes the output from the registers: a strip's row there is one or two whole
// cache lines, which leave without having been read.
#pragma once

#include "gemm_formats.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

constexpr int kStripRows = MOE_STRIP_ROWS;
constexpr int64_t kCacheLine = 64;

// Walks over the cache lines of a Fetch, a few at a time.
struct Fetcher {
  const char* const* line;
  const char* const* end;
  int64_t first;
  int64_t last;
  int64_t byte;

  Fetcher(const Fetch& wanted, int64_t first_line, int64_t num_lines)
      : line(wanted.lines + first_line),
        end(line + num_lines),
        first(wanted.first_byte),
        last(wanted.first_byte + wanted.bytes),
        byte(first) {}

  MOE_INLINE void fetch(int64_t count) {
    for (; count > 0 && line < end; --count) {
      __builtin_prefetch(*line + byte, 0, 2);
      byte += kCacheLine;
      if (byte >= last) byte = first, ++line;
    }
  }
};

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

template <typename Format, typename Output, int kRows>
void multiply_strip(const typename Format::Unit* left, const typename Format::Unit* right, int64_t depth,
                    typename Format::Sum* sums, bool first, const PanelOutput& output, const Fetcher& to_fetch) {
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
  Fetcher wanted = to_fetch;
  const int64_t chunks = depth / kChunk + 1;
  const int64_t cache_lines = (wanted.end - wanted.line) * ((wanted.last - wanted.first) / kCacheLine + 1);
  const int64_t wanted_at_once = (cache_lines + chunks - 1) / chunks;
  for (int64_t start = 0; start < depth; start += kChunk) {
    wanted.fetch(wanted_at_once);
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
  if (output.data) return write_rows<Format, Output>(acc, output);
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    Simd<Sum>::store(sums + row * 2 * kCount, acc[row][0]);
    Simd<Sum>::store(sums + row * 2 * kCount + kCount, acc[row][1]);
  }
}

template <typename Format>
using Strip = void (*)(const typename Format::Unit*, const typename Format::Unit*, int64_t, typename Format::Sum*, bool,
                       const PanelOutput&, const Fetcher&);

template <typename Format, typename Output, int kRows>
constexpr Strip<Format> strip_of() {
  if constexpr (kRows <= kStripRows) return &multiply_strip<Format, Output, kRows>;
  return nullptr;
}

template <typename Format, typename Output>
void multiply(const void* left, const void* right, int64_t num_rows, int64_t depth, void* sums, bool first,
              const PanelOutput& output, const Fetch& wanted) {
  static constexpr Strip<Format> kStrips[] = {
      strip_of<Format, Output, 1>(),  strip_of<Format, Output, 2>(),  strip_of<Format, Output, 3>(),
      strip_of<Format, Output, 4>(),  strip_of<Format, Output, 5>(),  strip_of<Format, Output, 6>(),
      strip_of<Format, Output, 7>(),  strip_of<Format, Output, 8>(),  strip_of<Format, Output, 9>(),
      strip_of<Format, Output, 10>(), strip_of<Format, Output, 11>(), strip_of<Format, Output, 12>(),
      strip_of<Format, Output, 13>(), strip_of<Format, Output, 14>()};
  auto* units = static_cast<const typename Format::Unit*>(left);
  auto* to = static_cast<typename Format::Sum*>(sums);
  PanelOutput out = output;
  out.stream = output.stream && kStreams<Output> && reinterpret_cast<std::uintptr_t>(output.data) % kCacheLine == 0 &&
               output.stride_bytes % kCacheLine == 0;
  int64_t fetched = 0;
  // Strips of nearly equal height: 64 rows are 13, 13, 13, 13, 12.
  for (int64_t strips = (num_rows + kStripRows - 1) / kStripRows; strips > 0; --strips) {
    const int64_t rows = (num_rows + strips - 1) / strips;
    const int64_t lines = (wanted.num_lines - fetched + strips - 1) / strips;
    kStrips[rows - 1](units, static_cast<const typename Format::Unit*>(right), depth, to, first, out,
                      Fetcher(wanted, fetched, lines));
    if (out.data) out.data += rows * out.stride_bytes;
    units += rows * kLeftStride;
    to += rows * kPanelCols<Format>;
    num_rows -= rows;
    fetched += lines;
  }
}

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
