// The activations of an expert, each as a value and a derivative: the one definition behind the CPU kernels, the CUDA
// kernels and the GEMM epilogues. python/moe_ext/activation_names.py repeats the names; a test holds the two together.
//
// Plain:  y = f(x), output as wide as the pre-activation.
// Gated:  y = f(gate) * up, output half as wide. Concatenated rows are [gate | up]; interleaved rows (gpt-oss) are
//         gate0, up0, gate1, up1, ...
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "../common/checks.h"
#include "fast_exp.h"

namespace moe_ext {

enum class Activation : int {
  kNone,
  kSilu,
  kGelu,
  kGeluTanh,
  kQuickGelu,
  kRelu,
  kReluSquared,
  kSwiglu,
  kSwigluClamped,
  kSwigluLimited,
  kGeglu,
  kGegluTanh,
  kReglu,
};

// In the order of the enum.
inline constexpr const char* kActivationNames[] = {
    "none",   "silu",           "gelu",           "gelu_tanh", "quick_gelu", "relu",  "relu_squared",
    "swiglu", "swiglu_clamped", "swiglu_limited", "geglu",     "geglu_tanh", "reglu",
};

// Gated activations come last in the enum.
MOE_HOST_DEVICE constexpr bool is_gated(Activation kind) { return kind >= Activation::kSwiglu; }

MOE_HOST_DEVICE constexpr bool is_clamped(Activation kind) {
  return kind == Activation::kSwigluClamped || kind == Activation::kSwigluLimited;
}

struct ActivationSpec {
  Activation kind = Activation::kNone;
  bool interleaved = false;
  double alpha = 1.702;  // swiglu_clamped only
  double limit = 7.0;    // of what is_clamped

  bool gated() const { return is_gated(kind); }
  int64_t output_width(int64_t width) const { return gated() ? width / 2 : width; }
};

// `with_none`: whether "none" is a choice here. `width`, the width of the pre-activation, must be even when gated.
inline ActivationSpec check_activation(const std::string& activation, const std::string& gate_up_layout, double alpha,
                                       double limit, bool with_none, int64_t width) {
  ActivationSpec spec;
  std::string choices;
  bool found = false;
  int index = 0;
  for (const char* name : kActivationNames) {
    if (index > 0 || with_none) {
      choices += (choices.empty() ? "" : ", ") + std::string(name);
      if (activation == name) {
        spec.kind = static_cast<Activation>(index);
        found = true;
      }
    }
    ++index;
  }
  MOE_CHECK(found, "activation: expected one of ", choices, ", got ", activation);
  MOE_CHECK(gate_up_layout == "concatenated" || gate_up_layout == "interleaved",
            "gate_up_layout: expected concatenated or interleaved, got ", gate_up_layout);
  spec.interleaved = gate_up_layout == "interleaved";
  spec.alpha = alpha;
  spec.limit = limit;
  MOE_CHECK(!is_clamped(spec.kind) || limit > 0, "activation_limit: expected a number > 0, got ", limit);
  MOE_CHECK(!spec.gated() || width % 2 == 0, "activation: ", activation,
            " needs an even number of gate and up columns, got ", width);
  return spec;
}

// Of a function on the device, in float. k16Bits, for what is rounded to 16 bits next: sigmoid(x) within
// (1.3 |x| + 8) * 2^-24 of its value, in half the instructions.
enum class Precision { kFull, k16Bits };

template <typename scalar_t>
constexpr Precision precision_for() {
  return sizeof(scalar_t) == 2 ? Precision::k16Bits : Precision::kFull;
}

// On the device zero below -87, and the reciprocal within 1 ulp: a division in full is a branch and a call, of which an
// epilogue would have one for each element.
template <Precision precision = Precision::kFull, typename T>
MOE_HOST_DEVICE_INLINE T sigmoid(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    return reciprocal_at_least_1(1.f + (precision == Precision::k16Bits ? fast_exp(-x) : exp_of(-x)));
  }
#endif
  return T(1) / (T(1) + exp_of(-x));
}

// Phi(x), the normal distribution function.
template <typename T>
MOE_HOST_DEVICE_INLINE T normal_cdf(T x) {
  return T(0.5) * erfc_of(x * T(-0.70710678118654752440));
}

// value = f(x) and derivative = f'(x) of the scalar function inside a plain or gated activation.
template <typename T>
struct ValueAndDerivative {
  T value;
  T derivative;
};

template <Activation kind, Precision precision = Precision::kFull, typename T>
MOE_HOST_DEVICE_INLINE ValueAndDerivative<T> scalar_function(T x) {
  if constexpr (kind == Activation::kSilu || kind == Activation::kSwiglu) {
    const T s = sigmoid<precision>(x);
    return {x * s, s * (T(1) + x * (T(1) - s))};
  } else if constexpr (kind == Activation::kGelu || kind == Activation::kGeglu) {
    const T cdf = normal_cdf(x);
    const T density = T(0.39894228040143267794) * exp_of(T(-0.5) * x * x);
    return {x * cdf, cdf + x * density};
  } else if constexpr (kind == Activation::kGeluTanh || kind == Activation::kGegluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
    constexpr T kTwice = T(1.59576912160573071176);
    constexpr T kCubic = T(0.044715);
    const T s = sigmoid<precision>(kTwice * (x + kCubic * x * x * x));
    return {x * s, s * (T(1) + x * (T(1) - s) * kTwice * (T(1) + T(3) * kCubic * x * x))};
  } else if constexpr (kind == Activation::kQuickGelu) {
    constexpr T kSlope = T(1.702);
    const T s = sigmoid<precision>(kSlope * x);
    return {x * s, s * (T(1) + kSlope * x * (T(1) - s))};
  } else if constexpr (kind == Activation::kRelu || kind == Activation::kReglu) {
    // Written so that NaN stays NaN.
    return {x < T(0) ? T(0) : x, x > T(0) ? T(1) : T(0)};
  } else if constexpr (kind == Activation::kReluSquared) {
    const T positive = x < T(0) ? T(0) : x;
    return {positive * positive, T(2) * positive};
  } else {
    static_assert(kind == Activation::kNone, "an activation without a formula");
    return {x, T(1)};
  }
}

template <typename T>
struct Gated {
  T value;
  T gate_derivative;  // d value / d gate
  T up_derivative;    // d value / d up
};

template <Activation kind, Precision precision = Precision::kFull, typename T>
MOE_HOST_DEVICE_INLINE Gated<T> gated_function(T gate, T up, T alpha, T limit) {
  static_assert(is_gated(kind));
  if constexpr (is_clamped(kind)) {
    // The gate is clamped from above, up from both sides. gpt-oss: gate * sigmoid(alpha * gate) * (up + 1);
    // DeepSeek-V4: silu(gate) * up. No gradient passes at the limit itself, as in torch.clamp since 2.14.
    constexpr bool limited = kind == Activation::kSwigluLimited;
    const T g = gate > limit ? limit : gate;
    const T u = up > limit ? limit : (up < -limit ? -limit : up);
    const T slope = limited ? T(1) : alpha, factor = limited ? u : u + T(1);
    const T s = sigmoid<precision>(slope * g);
    const T gate_derivative = s * (T(1) + slope * g * (T(1) - s)) * factor;
    return {g * s * factor, gate >= limit ? T(0) : gate_derivative, up >= limit || up <= -limit ? T(0) : g * s};
  } else {
    const ValueAndDerivative<T> f = scalar_function<kind, precision>(gate);
    return {f.value * up, f.derivative * up, f.value};
  }
}

template <Activation kind>
struct ActivationTag {
  static constexpr Activation value = kind;
};

// body(ActivationTag<kind>{})
template <typename Body>
void dispatch_activation(Activation kind, Body&& body) {
  switch (kind) {
    case Activation::kNone: return body(ActivationTag<Activation::kNone>{});
    case Activation::kSilu: return body(ActivationTag<Activation::kSilu>{});
    case Activation::kGelu: return body(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh: return body(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kQuickGelu: return body(ActivationTag<Activation::kQuickGelu>{});
    case Activation::kRelu: return body(ActivationTag<Activation::kRelu>{});
    case Activation::kReluSquared: return body(ActivationTag<Activation::kReluSquared>{});
    case Activation::kSwiglu: return body(ActivationTag<Activation::kSwiglu>{});
    case Activation::kSwigluClamped: return body(ActivationTag<Activation::kSwigluClamped>{});
    case Activation::kSwigluLimited: return body(ActivationTag<Activation::kSwigluLimited>{});
    case Activation::kGeglu: return body(ActivationTag<Activation::kGeglu>{});
    case Activation::kGegluTanh: return body(ActivationTag<Activation::kGegluTanh>{});
    case Activation::kReglu: return body(ActivationTag<Activation::kReglu>{});
  }
}

}  // namespace moe_ext
