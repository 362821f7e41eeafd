// turned: the transpose of rows @ cols^T, so that the weights need no packing at all. Lanes are rows, packed once for
// all columns of a tile, and each unit of a column is broadcast from where it lies in memory: 8 columns x 2 or 3
// vectors of rows, 6 x 4, 5 x 5 or 4 x 6 of accumulators, over the whole inner dimension at once. A Zen 5 then has a
// load or two left for every two multiply-adds. Few columns at a time, since lines a power of two apart share a set of
// L1, which holds 12 of them.
#pragma once

#include "gemm_packing.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

using Turned = decltype(GemmKernels::turned);

#if defined(__AVX512F__)
constexpr int kTurnedLanes = 16;
// Columns of a strip.
template <int kVectors>
constexpr int kTurnedHeight = kVectors <= 3   ? 8
                              : kVectors == 4 ? 6
                              : kVectors == 5 ? 5
                                              : 4;

// `bytes` of a unit; fewer than it has leave zeros.
template <typename Unit, int kBytes = sizeof(Unit)>
MOE_INLINE Unit load_unit(const char* from) {
  Unit unit = {};
  __builtin_memcpy(&unit, from, kBytes);
  return unit;
}

// The first `num_cols` of kCols columns exist; `ahead` bytes from each is what is fetched. Sums [kCols][kVectors * 16].
template <typename Format, int kVectors, int kCols>
void turned_strip(const typename Format::Unit* rows, int64_t panel_units, const char* cols, int64_t stride_bytes,
                  int64_t num_cols, int64_t count, int64_t ahead, typename Format::Sum* sums) {
  using Unit = typename Format::Unit;
  constexpr int64_t kUnitBytes = sizeof(Unit), kUnitsOfLine = kCacheLine / kUnitBytes;
  SumVec<Format> acc[kCols][kVectors] = {};
  const char* from[kCols];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kCols; ++i) from[i] = cols + (i < num_cols ? i : num_cols - 1) * stride_bytes;
  const auto step = [&]<int kBytes>(int64_t d) __attribute__((always_inline)) {
    UnitVec<Format> vectors[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Unit* panel = rows + v / 2 * panel_units;
      vectors[v] = Simd<Unit>::load(panel + d * kPanelCols<Format> + v % 2 * kTurnedLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCols; ++i) {
      const UnitVec<Format> value = broadcast<Unit>(load_unit<Unit, kBytes>(from[i] + d * kUnitBytes));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[i][v] = multiply_add<Format>(value, vectors[v], acc[i][v]);
    }
  };
  const int64_t units = count / Format::kPerUnit;
  int64_t d = 0;
  for (; d + kUnitsOfLine <= units;) {
#pragma GCC unroll 8
    for (int i = 0; i < kCols; ++i) __builtin_prefetch(from[i] + ahead + d * kUnitBytes, 0, 2);
    for (const int64_t end = d + kUnitsOfLine; d < end; d += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) step.template operator()<kUnitBytes>(d + i);
    }
  }
  for (; d < units; ++d) step.template operator()<kUnitBytes>(d);
  if constexpr (Format::kPerUnit == 2) {
    if (count % 2) step.template operator()<kUnitBytes / 2>(d);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCols; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Simd<typename Format::Sum>::store(sums + (i * kVectors + v) * kTurnedLanes, acc[i][v]);
    }
  }
}

template <typename Format, int kVectors>
void turned_columns(const typename Format::Unit* rows, int64_t panel_units, const char* cols, int64_t stride_bytes,
                    int64_t num_cols, int64_t count, const char* next, typename Format::Sum* sums,
                    int64_t sums_stride) {
  using Sum = typename Format::Sum;
  constexpr int kHeight = kTurnedHeight<kVectors>;
  constexpr int kRow = kVectors * kTurnedLanes;
  alignas(64) Sum turned[(kTurnedCols + kHeight) * kRow];
  int64_t col = 0;
  // Strips of nearly equal height: 64 columns are 6, 6, 6, 6, 6, 6, 6, 6, 6, 5, 5.
  for (int64_t strips = (num_cols + kHeight - 1) / kHeight; strips > 0; --strips) {
    const int64_t height = (num_cols - col + strips - 1) / strips;
    const char* from = cols + col * stride_bytes;
    const int64_t ahead = (strips > 1 ? from + height * stride_bytes : next) - from;
    const auto strip =
        height == kHeight ? &turned_strip<Format, kVectors, kHeight> : &turned_strip<Format, kVectors, kHeight - 1>;
    strip(rows, panel_units, from, stride_bytes, height, count, ahead, turned + col * kRow);
    col += height;
  }
  SumVec<Format> lines[kTurnedLanes];
  for (col = 0; col < num_cols; col += kTurnedLanes) {
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
      for (int i = 0; i < kTurnedLanes; ++i) {
        // What is past the last column goes past it.
        const int64_t line = col + i < num_cols ? col + i : num_cols - 1;
        lines[i] = Simd<Sum>::load(turned + line * kRow + v * kTurnedLanes);
      }
      transpose<Sum>(lines, sums + v * kTurnedLanes * sums_stride + col, sums_stride);
    }
  }
}

template <typename Format>
void turned(const void* rows, int64_t panel_units, int64_t num_rows, const char* cols, int64_t stride_bytes,
            int64_t num_cols, int64_t count, const char* next, void* sums, int64_t sums_stride) {
  const auto run = [&](auto* columns) {
    columns(static_cast<const typename Format::Unit*>(rows), panel_units, cols, stride_bytes, num_cols, count, next,
            static_cast<typename Format::Sum*>(sums), sums_stride);
  };
  static_assert(kTurnedRows == 6 * kTurnedLanes);
  switch ((num_rows + kTurnedLanes - 1) / kTurnedLanes) {
    case 6: return run(&turned_columns<Format, 6>);
    case 5: return run(&turned_columns<Format, 5>);
    case 4: return run(&turned_columns<Format, 4>);
    case 3: return run(&turned_columns<Format, 3>);
    default: return run(&turned_columns<Format, 2>);
  }
}

template <typename Format>
constexpr Turned turned_if_any() {
  if constexpr (kLiesInUnits<Format>) return &turned<Format>;
  return nullptr;
}
template <typename Format>
constexpr Turned kTurned = turned_if_any<Format>();
#else
template <typename Format>
constexpr Turned kTurned = nullptr;
#endif

}  // namespace
}  // namespace moe_ext::cpu::MOE_ISA
