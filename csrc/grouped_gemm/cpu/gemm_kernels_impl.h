// See gemm_kernels.h. The including file defines MOE_ISA (a namespace), MOE_VECTOR_BYTES, MOE_STRIP_ROWS and, where
// there are bfloat16 dot products, MOE_BF16_DOT.
#include "gemm_in_place.h"
#include "gemm_packing.h"
#include "gemm_strips.h"
#include "gemm_turned.h"

namespace moe_ext::cpu::MOE_ISA {
namespace {

template <typename Format>
void widen(const char* from, int64_t from_stride_bytes, int64_t num_rows, int64_t num_cols, void* sums,
           int64_t sums_stride) {
  using Sum = typename Format::Sum;
  constexpr int kCount = Simd<Sum>::kLanes;
  for (int64_t row = 0; row < num_rows; ++row) {
    Sum* to = static_cast<Sum*>(sums) + row * sums_stride;
    for (int64_t col = 0; col < num_cols; col += kCount) {
      const SumVec<Format> value = load_sums<Format>(from + row * from_stride_bytes, col, num_cols - col);
      if (num_cols - col >= kCount) {
        Simd<Sum>::store(to + col, value);
      } else {
        copy_bytes(reinterpret_cast<char*>(to + col), reinterpret_cast<const char*>(&value),
                   (num_cols - col) * static_cast<int64_t>(sizeof(Sum)));
      }
    }
  }
}

template <typename Format, typename Output>
void finish(const void* sums, int64_t sums_stride, int64_t num_rows, int64_t num_cols, const char* bias, char* output,
            int64_t output_stride_bytes) {
  using Sum = typename Format::Sum;
  constexpr int kCount = Simd<Sum>::kLanes;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(typename Output::Element));
  for (int64_t row = 0; row < num_rows; ++row) {
    const Sum* from = static_cast<const Sum*>(sums) + row * sums_stride;
    char* to = output + row * output_stride_bytes;
    int64_t col = 0;
    for (; col + 2 * kCount <= num_cols; col += 2 * kCount) {
      SumVec<Format> low = Simd<Sum>::load(from + col), high = Simd<Sum>::load(from + col + kCount);
      if (bias) low += load_sums<Format>(bias, col, kCount), high += load_sums<Format>(bias, col + kCount, kCount);
      write_row<Output>(to + col * kBytes, low, high, false);
    }
    for (; col < num_cols; col += kCount) {
      const int64_t count = num_cols - col < kCount ? num_cols - col : kCount;
      alignas(64) char padded[MOE_VECTOR_BYTES] = {};
      if (count < kCount) copy_bytes(padded, reinterpret_cast<const char*>(from + col), count * sizeof(Sum));
      SumVec<Format> value = Simd<Sum>::load(count < kCount ? padded : reinterpret_cast<const char*>(from + col));
      if (bias) value += load_sums<Format>(bias, col, count);
      if (count < kCount) {
        Output::store(padded, value);
        copy_bytes(to + col * kBytes, padded, count * kBytes);
        continue;
      }
      Output::store(to + col * kBytes, value);
    }
  }
}

template <typename Format, typename Output>
constexpr GemmKernels make_kernels() {
  using Unit = typename Format::Unit;
  static_assert(sizeof(Unit) == sizeof(typename Format::Sum) && kPanelCols<Format> <= kMaxPanelCols);
  return {sizeof(typename Format::Element),
          sizeof(typename Output::Element),
          sizeof(Unit),
          Format::kPerUnit,
          kLanes<Format> * Format::kPerUnit,
          kPanelCols<Format>,
          kStripRows,
          kPacksAhead<Format>,
          &pack_left_inner<Format>,
          &pack_left_outer<Format>,
          &pack_right_inner<Format>,
          &pack_right_outer<Format>,
          &multiply<Format, Output>,
          &dot<Format>,
          kTurned<Format>,
          &axpy<Format>,
          &widen<Format>,
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
