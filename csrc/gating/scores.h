// Score functions of the gate, shared by every gating op and both backends. All are increasing in the logit.
#pragma once

#include <cmath>
#include <string>
#include <type_traits>

#include "../common/dtypes.h"
#include "../common/host_device.h"

namespace moe_ext {

enum class ScoreFunction { kSoftmax, kSigmoid, kSqrtSoftplus, kIdentity };

inline ScoreFunction parse_score_function(const std::string& name) {
  if (name == "softmax") return ScoreFunction::kSoftmax;
  if (name == "sigmoid") return ScoreFunction::kSigmoid;
  if (name == "sqrt_softplus") return ScoreFunction::kSqrtSoftplus;
  if (name == "identity") return ScoreFunction::kIdentity;
  MOE_CHECK(false, "score_function: expected softmax, sigmoid, sqrt_softplus or identity, got ", name);
}

// On the device within 2 ulp, and without the calls that the slow paths of IEEE division and root are: a row of inlined
// divisions costs registers, spills and most of a gate's instructions.
template <typename acc_t>
MOE_HOST_DEVICE inline acc_t divide(acc_t a, acc_t b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<acc_t, float>) return __fdividef(a, b);
#endif
  return a / b;
}

template <typename acc_t>
MOE_HOST_DEVICE inline acc_t root(acc_t x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<acc_t, float>) {
    float result;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
#endif
  return sqrt(x);
}

template <typename acc_t>
MOE_HOST_DEVICE inline acc_t sigmoid_of(acc_t x) {
  return divide<acc_t>(acc_t(1), acc_t(1) + exp(-x));
}

template <typename acc_t>
MOE_HOST_DEVICE inline acc_t softplus_of(acc_t x) {
  // NaN must come out as NaN: fmax would hide it.
  return (x > acc_t(0) || x != x ? x : acc_t(0)) + log1p(exp(-fabs(x)));
}

// Scores that look at one logit only; softmax is exp(x - max) / sum and lives with its callers.
template <typename acc_t>
MOE_HOST_DEVICE inline acc_t elementwise_score(ScoreFunction function, acc_t x) {
  switch (function) {
    case ScoreFunction::kSigmoid: return sigmoid_of(x);
    case ScoreFunction::kSqrtSoftplus: return root<acc_t>(softplus_of(x));
    default: return x;
  }
}

template <typename acc_t>
MOE_HOST_DEVICE inline acc_t elementwise_score_gradient(ScoreFunction function, acc_t x) {
  switch (function) {
    case ScoreFunction::kSigmoid: {
      const acc_t s = sigmoid_of(x);
      return s * (acc_t(1) - s);
    }
    case ScoreFunction::kSqrtSoftplus: {
      const acc_t score = root<acc_t>(softplus_of(x));
      return score == acc_t(0) ? acc_t(0) : divide<acc_t>(sigmoid_of(x), acc_t(2) * score);
    }
    default: return acc_t(1);
  }
}

// softmax of one row from its largest logit and the sum of exp(logit - largest), over the logits that take part.
template <typename acc_t>
struct SoftmaxRow {
  acc_t largest, sum;
  MOE_HOST_DEVICE acc_t probability(acc_t logit) const { return divide<acc_t>(exp(logit - largest), sum); }
};

}  // namespace moe_ext
