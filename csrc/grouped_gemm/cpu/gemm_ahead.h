// What `multiply` does between the multiply-adds, a few pieces of it at a time: it fetches cache lines, or packs the
// next right panel. The multiply-adds leave the shuffles' units and most of the load and store ports idle (a Zen 5 does
// two of each a cycle at once), so packing costs little there; it has to come in pieces that are small beside what a
// core looks ahead, about 450 instructions, and to get by with few registers, since those of the sums are taken.
#pragma once

#include "gemm_formats.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

constexpr int64_t kCacheLine = 64;

// Walks over the cache lines of a Fetch, a few at a time.
struct Fetcher {
  const char* const* line;
  const char* const* end;
  int64_t first;
  int64_t last;
  int64_t byte;

  explicit Fetcher(const Fetch& wanted)
      : line(wanted.lines),
        end(line + wanted.num_lines),
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

  // Up to four of one line, without a loop.
  MOE_INLINE void fetch_four() {
    if (line >= end) return;
    const char* from = *line + byte;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) __builtin_prefetch(from + i * kCacheLine, 0, 2);
    byte += 4 * kCacheLine;
    const bool over = byte >= last;
    byte = over ? first : byte;
    line += over;
  }
};

// The work of one call on `strips` strips of `depth` units: some() before each `chunk` of units, rest() after the last.
struct FetchOnly {
  static constexpr int kUnrolled = 1;  // units of the inner dimension
  static constexpr int64_t chunk = 16;

  FetchOnly(const Ahead& ahead, int64_t strips, int64_t depth) : fetcher(ahead.after) {
    const int64_t chunks = strips * (depth / chunk + 1);
    lines_at_once = (ahead.after.num_lines * (ahead.after.bytes / kCacheLine + 1) + chunks - 1) / chunks;
  }

  MOE_INLINE void some() { fetcher.fetch(lines_at_once); }
  void rest() {}

 private:
  Fetcher fetcher;
  int64_t lines_at_once;
};

#if defined(__AVX512F__)
template <typename Format>
constexpr bool kPacksAhead = kLiesInUnits<Format>;

// One piece at a time, without a loop: several in a row are more than a core looks ahead. Two where there are too few
// strips for that, rather than the rest of them after the last.
template <typename Pieces>
struct PackAhead {
  static constexpr int kUnrolled = 4;
  int64_t chunk = 16;

  PackAhead(const Ahead& ahead, int64_t strips, int64_t depth) : pieces(ahead), num_pieces(pieces.count()) {
    while (chunk > kUnrolled && strips * (depth / chunk) < num_pieces) chunk /= 2;
    two = strips * (depth / chunk) < num_pieces;
  }

  MOE_INLINE void some() {
    if (piece < num_pieces) pieces.pack(piece++);
    if (two && piece < num_pieces) pieces.pack(piece++);
  }
  void rest() {
    while (piece < num_pieces) some();
  }

 private:
  Pieces pieces;
  int64_t num_pieces;
  int64_t piece = 0;
  bool two;
};

// Lines along the inner dimension. A piece is 4 columns x 16 units, transposed in each quarter of a register and
// written as 16 quarters: 16 columns of one quarter would touch as many lines four times, and lines a power of two
// apart crowd a set of L1.
template <typename Format>
struct InnerPieces {
  static constexpr int64_t kQuads = kLanes<Format> / 4;

  explicit InnerPieces(const Ahead& ahead)
      : ahead(ahead), blocks(ahead.count / (kLanes<Format> * Format::kPerUnit)), fetcher(ahead.after) {}

  int64_t count() const { return kPanelCols<Format> / 4 * blocks; }

  MOE_INLINE void pack(int64_t piece) {
    const int64_t quad = piece % kQuads, place = piece / kQuads;  // the quads of 16 columns follow one another
    const int64_t group = place >= blocks, block = place - group * blocks;
    const int64_t col = group * kLanes<Format> + quad * 4;
    const char* const* cols = ahead.lines + col;
    const int64_t offset = ahead.first * static_cast<int64_t>(sizeof(typename Format::Element)) + block * kCacheLine;
    float* to = static_cast<float*>(ahead.right) + block * kLanes<Format> * kPanelCols<Format> + col;
    const auto load = [&](int i) { return _mm512_loadu_ps(cols[i] + offset); };
    const auto join = [](__m512 ab, __m512 cd, float* to) __attribute__((always_inline)) {
      const auto pairs_ab = reinterpret_cast<__m512d>(ab), pairs_cd = reinterpret_cast<__m512d>(cd);
      store_quarters(to, _mm512_unpacklo_pd(pairs_ab, pairs_cd));
      store_quarters(to + kPanelCols<Format>, _mm512_unpackhi_pd(pairs_ab, pairs_cd));
    };
    // Loaded twice rather than kept: three registers are enough.
    join(_mm512_unpacklo_ps(load(0), load(1)), _mm512_unpacklo_ps(load(2), load(3)), to);
    join(_mm512_unpackhi_ps(load(0), load(1)), _mm512_unpackhi_ps(load(2), load(3)), to + 2 * kPanelCols<Format>);
    fetcher.fetch_four();  // as much as a piece reads
  }

 private:
  // Units 0, 4, 8 and 12 of four columns.
  static MOE_INLINE void store_quarters(float* to, __m512d columns) {
    const auto quarters = reinterpret_cast<__m512>(columns);
    _mm_storeu_ps(to, _mm512_castps512_ps128(quarters));
    _mm_storeu_ps(to + 4 * kPanelCols<Format>, _mm512_extractf32x4_ps(quarters, 1));
    _mm_storeu_ps(to + 8 * kPanelCols<Format>, _mm512_extractf32x4_ps(quarters, 2));
    _mm_storeu_ps(to + 12 * kPanelCols<Format>, _mm512_extractf32x4_ps(quarters, 3));
  }

  const Ahead& ahead;
  int64_t blocks;
  Fetcher fetcher;
};

// Lines across the inner dimension. A piece is a step: a line, or a pair of them. They are fetched only some steps
// ahead: the lines of a whole panel, a power of two apart, would crowd some sets of L2.
template <typename Format>
struct OuterPieces {
  static constexpr int64_t kLinesAhead = 128, kLines = Format::kPerUnit;
  static constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Format::Element));

  explicit OuterPieces(const Ahead& ahead) : ahead(ahead) {}

  int64_t count() const { return (ahead.count + kLines - 1) / kLines; }

  MOE_INLINE void pack(int64_t piece) {
    const char* lines[kLines];
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLines; ++i) lines[i] = columns(kLines * piece + i);
    UnitVec<Format> units[2];
    load_block_across<Format>(lines, kLines, 0, 0, units);
    if constexpr (kLines == 1) load_block_across<Format>(lines, kLines, 0, kLanes<Format>, units + 1);
    auto* to = static_cast<typename Format::Unit*>(ahead.right) + piece * kPanelCols<Format>;
    Simd<typename Format::Unit>::store(to, units[0]);
    Simd<typename Format::Unit>::store(to + kLanes<Format>, units[1]);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kLines; ++i) fetch(kLines * piece + i + kLinesAhead);
  }

 private:
  static constexpr int64_t kPanelBytes = kPanelCols<Format> * kBytes;

  // A panel's columns of a line; zeros where there is none.
  MOE_INLINE const char* columns(int64_t line) const {
    alignas(64) static constexpr char kZeros[kPanelBytes] = {};
    const char* from = line < ahead.count ? ahead.lines[line] : nullptr;
    return from ? from + ahead.first * kBytes : kZeros;
  }

  MOE_INLINE void fetch(int64_t line) const {
    const int64_t later = line - ahead.count;
    if (later >= ahead.after.num_lines) return;
    const char* from =
        later < 0 ? ahead.lines[line] + ahead.first * kBytes : ahead.after.lines[later] + ahead.after.first_byte;
#pragma GCC unroll 2
    for (int64_t byte = 0; byte < kPanelBytes; byte += kCacheLine) __builtin_prefetch(from + byte, 0, 2);
  }

  const Ahead& ahead;
};

template <typename Format>
using PackInner = PackAhead<InnerPieces<Format>>;
template <typename Format>
using PackOuter = PackAhead<OuterPieces<Format>>;
#else
template <typename Format>
constexpr bool kPacksAhead = false;
#endif

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
