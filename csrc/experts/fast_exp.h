// exp and erfc for kernels that run on both sides. On the host, exp of a float is branch-free so that loops over it
// vectorise (libm's does not); on the device and for double it is the library's. Beside them what the device has for
// results of 16 bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../common/host_device.h"

namespace moe_ext {

MOE_HOST_DEVICE_INLINE double exp_of(double x) { return exp(x); }

// Within 2 ulp of exp on [-87, 88]; clamped to the values at these ends outside; NaN stays NaN.
// Cody-Waite reduction x = n ln2 + r and the polynomial of Cephes' expf for r in [-ln2/2, ln2/2].
MOE_HOST_DEVICE_INLINE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x > 88.f ? 88.f : x;
  x = x < -87.f ? -87.f : x;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound) + 127u) << 23;
  return p * std::bit_cast<float>(exponent);
#endif
}

#ifdef __CUDA_ARCH__
// Two instructions; relative error (1.3 |x| + 4) * 2^-24. Subnormal results are zero.
__device__ __forceinline__ float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
  return result;
}

// Of x >= 1, infinity or NaN, within 1 ulp; zero beyond 2^126. Nothing need be done for a subnormal x.
__device__ __forceinline__ float reciprocal_at_least_1(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

MOE_HOST_DEVICE_INLINE double erfc_of(double x) { return erfc(x); }

// The Chebyshev fit of Numerical Recipes (erfcc), branch-free; gelu by it is within 2e-6 relative above -5.5.
MOE_HOST_DEVICE_INLINE float erfc_of(float x) {
#ifdef __CUDA_ARCH__
  return erfcf(x);
#else
  const float z = x < 0.f ? -x : x;
  const float t = 1.f / (1.f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float tail = t * exp_of(p - z * z);
  return x < 0.f ? 2.f - tail : tail;
#endif
}

}  // namespace moe_ext
