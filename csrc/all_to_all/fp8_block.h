// e4m3 with one scale for a block of elements: scale = largest magnitude / 448, element = value / scale.
// A block of zeros has the smallest normal scale, so that no quotient overflows. NaN stays NaN and spreads over its
// block through the scale; so does infinity.
#pragma once

#include <torch/headeronly/util/Float8_e4m3fn.h>

#include <bit>
#include <cstdint>

#include "../common/host_device.h"

namespace moe_ext {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestScale = 0x1p-126f;

// The larger of two magnitudes; NaN is larger than any.
MOE_HOST_DEVICE_INLINE float larger_magnitude(float largest, float magnitude) {
  return magnitude > largest || magnitude != magnitude ? magnitude : largest;
}

// A division is a call with a stack frame on the device. There quotients are products with a reciprocal, corrected
// twice by their remainder, which rounds them as a division does where no remainder is subnormal.
MOE_HOST_DEVICE_INLINE float corrected_quotient(float value, float divisor, float reciprocal) {
  float quotient = value * reciprocal;
  quotient = fmaf(fmaf(-quotient, divisor, value), reciprocal, quotient);
  return fmaf(fmaf(-quotient, divisor, value), reciprocal, quotient);
}

MOE_HOST_DEVICE_INLINE float block_scale(float largest) {
#ifdef __CUDA_ARCH__
  const float quotient = corrected_quotient(largest, kLargestE4m3, 1 / kLargestE4m3);
  const float scale = isfinite(largest) ? quotient : largest;
#else
  const float scale = largest / kLargestE4m3;
#endif
  return scale < kSmallestScale ? kSmallestScale : scale;
}

// value / scale, rounded to nearest, for |value| <= 448 * scale.
class BlockDivision {
 public:
  MOE_HOST_DEVICE_INLINE explicit BlockDivision(float scale) : scale(scale) {
#ifdef __CUDA_ARCH__
    lift = scale < 0x1p-90f ? 0x1p60f : 1.0f;  // tiny scales are lifted out of reach of the subnormals
    this->scale *= lift;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(this->scale));
    if (isfinite(scale)) inverse = fmaf(fmaf(-this->scale, inverse, 1.0f), inverse, inverse);
#endif
  }

  MOE_HOST_DEVICE_INLINE float operator()(float value) const {
#ifdef __CUDA_ARCH__
    value *= lift;
    // As it is: a quotient of zero, which keeps its sign, and that by an infinite scale.
    return value == 0 || inverse == 0 ? value * inverse : corrected_quotient(value, scale, inverse);
#else
    return value / scale;
#endif
  }

 private:
  float scale;
#ifdef __CUDA_ARCH__
  float lift, inverse;
#endif
};

MOE_HOST_DEVICE_INLINE uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

// To the nearest e4m3, ties to even, |value| <= 448 or NaN; without branches, so that loops vectorise.
MOE_HOST_DEVICE_INLINE uint8_t to_e4m3(float value) {
  constexpr uint32_t kSignBit = 0x80000000u, kSmallestNormal = 121u << 23, kNanFrom = 1087u << 20;
  constexpr uint32_t kSubnormalShift = 141u
                                       << 23;  // 2^14: adding it leaves a subnormal's bits in the low byte, rounded
  const uint32_t bits = float_bits(value), magnitude = bits & ~kSignBit;
  const float absolute = value < 0 ? -value : value;
  const uint32_t subnormal = float_bits(absolute + 16384.0f) - kSubnormalShift;
  const uint32_t normal = (magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
  const uint32_t rounded = magnitude < kSmallestNormal ? subnormal : normal;
  return static_cast<uint8_t>((magnitude >= kNanFrom ? 0x7Fu : rounded) | ((bits & kSignBit) >> 24));
}

MOE_HOST_DEVICE_INLINE float from_e4m3(uint8_t value) { return c10::detail::fp8e4m3fn_to_fp32_value(value); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define MOE_CONVERTS_E4M3
#endif

// Two at once, the second in the high byte: one instruction where there is one, of the same bits but for the sign of
// NaN.
MOE_HOST_DEVICE_INLINE uint32_t to_e4m3_pair(float low, float high) {
#ifdef MOE_CONVERTS_E4M3
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return to_e4m3(low) | uint32_t{to_e4m3(high)} << 8;
#endif
}

struct FloatPair {
  float low, high;
};

MOE_HOST_DEVICE_INLINE FloatPair from_e4m3_pair(uint16_t pair) {
#ifdef MOE_CONVERTS_E4M3
  FloatPair values;  // through float16, which holds every e4m3
  asm("{\n"
      ".reg .b32 both;\n"
      ".reg .b16 first, second;\n"
      "cvt.rn.f16x2.e4m3x2 both, %2;\n"
      "mov.b32 {first, second}, both;\n"
      "cvt.f32.f16 %0, first;\n"
      "cvt.f32.f16 %1, second;\n"
      "}"
      : "=f"(values.low), "=f"(values.high)
      : "h"(pair));
  return values;
#else
  return {from_e4m3(static_cast<uint8_t>(pair)), from_e4m3(static_cast<uint8_t>(pair >> 8))};
#endif
}

}  // namespace moe_ext
