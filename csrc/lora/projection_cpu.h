// Dot products of tokens with the rows of the weights that they pick, on the CPU.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/dtypes.h"
#include "../common/host_device.h"

// Instructions that the products use where the machine has them (choose_kernels).
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define MOE_EXT_PAIRS
#define MOE_PAIRS_TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#endif

namespace moe_ext::cpu {

constexpr int64_t kTokenBlock = 64;
constexpr int64_t kSlab = 128;
// Sixteen (of float64 eight) independent partial sums: one vector, and an order that does not depend on threads.
constexpr int64_t kLaneBytes = 64;
template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLaneBytes)));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;
template <typename acc_t>
constexpr int64_t kLanes = kLaneBytes / static_cast<int64_t>(sizeof(acc_t));

template <typename acc_t, typename scalar_t>
MOE_HOST_DEVICE_INLINE void load_lanes(const scalar_t* source, Lanes<acc_t>& lanes) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(&lanes, source, sizeof(lanes));
  } else if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    uint16_t halves __attribute__((vector_size(kLaneBytes / 2)));
    std::memcpy(&halves, source, sizeof(halves));
    const auto words = __builtin_convertvector(halves, Lanes<uint32_t>) << 16;
    std::memcpy(&lanes, &words, sizeof(lanes));
  } else {
    acc_t values[kLanes<acc_t>];
    for (int64_t l = 0; l < kLanes<acc_t>; ++l) values[l] = static_cast<acc_t>(source[l]);
    std::memcpy(&lanes, values, sizeof(lanes));
  }
}

// The sum of all lanes, halves on halves.
template <typename acc_t>
MOE_HOST_DEVICE_INLINE acc_t fold(const Lanes<acc_t>& lanes) {
  acc_t values[kLanes<acc_t>];
  std::memcpy(values, &lanes, sizeof(lanes));
  for (int64_t half = kLanes<acc_t> / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) values[l] += values[l + half];
  }
  return values[0];
}

// totals[i] += the sum of all lanes of sums[i], four at once.
template <typename acc_t>
MOE_HOST_DEVICE_INLINE void fold_four(const Lanes<acc_t>* sums, acc_t* totals) {
  if constexpr (kLanes<acc_t> == 16) {
    Lanes<acc_t> a, b, quarters;
    const auto add_halves = [](const Lanes<acc_t>& first, const Lanes<acc_t>& second, Lanes<acc_t>& out) {
      out = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
            __builtin_shufflevector(first, second, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    add_halves(sums[0], sums[1], a);
    add_halves(sums[2], sums[3], b);
    quarters = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    quarters += __builtin_shufflevector(quarters, quarters, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    quarters += __builtin_shufflevector(quarters, quarters, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    for (int i = 0; i < 4; ++i) totals[i] += quarters[4 * i];
  } else {
    for (int i = 0; i < 4; ++i) totals[i] += fold<acc_t>(sums[i]);
  }
}

// Rows that tokens pick from: [E * r, width] as it lies, or a copy in the type of the sums, slab after slab of kSlab
// columns. Rows of a slab are adjacent there: rows a power of two apart would fall on the same lines of L1.
template <typename weight_t>
struct WeightRows {
  const weight_t* data;
  int64_t row_stride, column_stride;

  const weight_t* slab(int64_t first_column) const { return data + first_column * column_stride; }
};

// The rows that a block of tokens picks: those of token t are picked[first[t]] ... picked[first[t + 1] - 1].
template <typename acc_t>
struct Picks {
  int64_t tokens;
  int64_t first[kTokenBlock + 1];
  std::vector<int64_t> rows;
  std::vector<acc_t> dots, factors;
};

// dots[i] += weights' row picked[i] . x
template <int count, typename weight_t, typename acc_t>
MOE_HOST_DEVICE_INLINE void add_dots(const acc_t* x, const WeightRows<weight_t>& weights, const weight_t* slab,
                                     const int64_t* picked, int64_t columns, acc_t* dots) {
  constexpr int64_t kStep = kLanes<acc_t>;
  const weight_t* rows[count];
  for (int i = 0; i < count; ++i) rows[i] = slab + picked[i] * weights.row_stride;
  Lanes<acc_t> sums[count] = {};
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    Lanes<acc_t> mine, row;
    load_lanes<acc_t>(x + c, mine);
    for (int i = 0; i < count; ++i) {
      load_lanes<acc_t>(rows[i] + c, row);
      sums[i] += mine * row;
    }
  }
  if constexpr (count == 4) {
    fold_four<acc_t>(sums, dots);
  } else {
    for (int i = 0; i < count; ++i) dots[i] += fold<acc_t>(sums[i]);
  }
  for (; c < columns; ++c) {
    for (int i = 0; i < count; ++i) dots[i] += x[c] * static_cast<acc_t>(rows[i][c]);
  }
}

// Dot products of a block's tokens, over one slab of columns of x [tokens, width].
template <typename scalar_t, typename weight_t>
MOE_CPU_CLONES void project_slab(const scalar_t* x, int64_t width, const WeightRows<weight_t>& weights, int64_t first,
                                 int64_t columns, Picks<accumulate_t<scalar_t>>& picks) {
  using acc_t = accumulate_t<scalar_t>;
  const weight_t* slab = weights.slab(first);
  acc_t wide[kSlab];
  for (int64_t t = 0; t < picks.tokens; ++t) {
    const scalar_t* narrow = x + t * width + first;
    const acc_t* row = wide;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      row = narrow;
    } else {
      for (int64_t c = 0; c < columns; ++c) wide[c] = static_cast<acc_t>(narrow[c]);
    }
    int64_t i = picks.first[t];
    const int64_t end = picks.first[t + 1];
    const int64_t* rows = picks.rows.data();
    acc_t* dots = picks.dots.data();
    for (; i + 4 <= end; i += 4) add_dots<4>(row, weights, slab, rows + i, columns, dots + i);
    for (; i < end; ++i) add_dots<1>(row, weights, slab, rows + i, columns, dots + i);
  }
}

// x [tokens, width], rows of `weights` as they lie or copied in the type of the sums.
template <typename scalar_t, typename weight_t>
void project(const scalar_t* x, int64_t width, const WeightRows<weight_t>& weights,
             Picks<accumulate_t<scalar_t>>& picks) {
  for (int64_t first = 0; first < width; first += kSlab) {
    project_slab(x, width, weights, first, std::min(kSlab, width - first), picks);
  }
}

#ifdef MOE_EXT_PAIRS
// The same with instructions that multiply and add pairs of bfloat16: a slab is copied as it is and twice as wide.
constexpr int64_t kPairSlab = 2 * kSlab;
constexpr int64_t kPairStep = 32;

template <int count>
MOE_PAIRS_TARGET inline void add_pair_dots(const __m512bh* x, const BFloat16* const* rows, float* dots) {
  Lanes<float> sums[count] = {};
  for (int64_t v = 0; v < kPairSlab / kPairStep; ++v) {
    for (int i = 0; i < count; ++i) {
      const auto row = (__m512bh)_mm512_load_si512(rows[i] + v * kPairStep);
      sums[i] = (Lanes<float>)_mm512_dpbf16_ps((__m512)sums[i], x[v], row);
    }
  }
  if constexpr (count == 4) {
    fold_four<float>(sums, dots);
  } else {
    dots[0] += fold<float>(sums[0]);
  }
}

// `weights`: slabs of kPairSlab columns, zero beyond the width.
MOE_PAIRS_TARGET inline void project_pairs(const BFloat16* x, int64_t width, const WeightRows<BFloat16>& weights,
                                           Picks<float>& picks) {
  for (int64_t first = 0; first < width; first += kPairSlab) {
    const int64_t columns = std::min(kPairSlab, width - first);
    const BFloat16* slab = weights.slab(first);
    alignas(kLaneBytes) BFloat16 padded[kPairSlab] = {};
    for (int64_t t = 0; t < picks.tokens; ++t) {
      const BFloat16* own = x + t * width + first;
      if (columns < kPairSlab) own = static_cast<BFloat16*>(std::memcpy(padded, own, columns * sizeof(BFloat16)));
      __m512bh vectors[kPairSlab / kPairStep];
      for (int64_t v = 0; v < kPairSlab / kPairStep; ++v) {
        vectors[v] = (__m512bh)_mm512_loadu_si512(own + v * kPairStep);
      }
      int64_t i = picks.first[t];
      const int64_t end = picks.first[t + 1];
      const BFloat16* rows[4];
      for (; i + 4 <= end; i += 4) {
        for (int n = 0; n < 4; ++n) rows[n] = slab + picks.rows[i + n] * weights.row_stride;
        add_pair_dots<4>(vectors, rows, picks.dots.data() + i);
      }
      for (; i < end; ++i) {
        rows[0] = slab + picks.rows[i] * weights.row_stride;
        add_pair_dots<1>(vectors, rows, picks.dots.data() + i);
      }
    }
  }
}
#endif

}  // namespace moe_ext::cpu
