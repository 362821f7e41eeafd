// One token's row of experts on the CPU: loops that vectorise, and the selection of its best experts.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/ordered_key.h"
#include "../experts/fast_exp.h"
#include "scores.h"

namespace moe_ext::cpu {

// Partial sums and maxima are kept in this many lanes: vectorisable, and one order whatever the machine.
constexpr int64_t kRowLanes = 16;
// exp and friends cost about this many bytes' worth of copying.
constexpr int64_t kBytesPerScore = 16;

inline int64_t padded_row(int64_t size) { return (size + kRowLanes - 1) / kRowLanes * kRowLanes; }

template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void read_logits(const scalar_t* source, int64_t num_experts, acc_t* logits) {
  for (int64_t e = 0; e < num_experts; ++e) logits[e] = static_cast<acc_t>(source[e]);
}

// exp of a logit less the largest: exactly 0 for -inf, where the vectorisable exp stops at e^-87.
template <typename acc_t>
MOE_HOST_DEVICE_INLINE acc_t exp_of_difference(acc_t x) {
  return x < acc_t(-87) && sizeof(acc_t) == sizeof(float) ? acc_t(0) : exp_of(x);
}

// The softmax of a row padded to whole lanes with -inf, where what takes no part is -inf too. No NaN may be inside.
template <typename acc_t>
MOE_CPU_CLONES SoftmaxRow<acc_t> softmax_of_row(const acc_t* logits, int64_t padded) {
  acc_t best[kRowLanes], sums[kRowLanes];
  for (int64_t l = 0; l < kRowLanes; ++l) best[l] = -std::numeric_limits<acc_t>::infinity();
  for (int64_t e = 0; e < padded; e += kRowLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) best[l] = logits[e + l] > best[l] ? logits[e + l] : best[l];
  }
  const acc_t largest = *std::max_element(best, best + kRowLanes);
  for (int64_t l = 0; l < kRowLanes; ++l) sums[l] = 0;
  for (int64_t e = 0; e < padded; e += kRowLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) sums[l] += exp_of_difference(logits[e + l] - largest);
  }
  acc_t sum = 0;
  for (int64_t l = 0; l < kRowLanes; ++l) sum += sums[l];
  return {largest, sum};
}

template <typename acc_t>
MOE_HOST_DEVICE_INLINE acc_t sum_of_row(const acc_t* values, int64_t padded) {
  acc_t sums[kRowLanes] = {}, sum = 0;
  for (int64_t e = 0; e < padded; e += kRowLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) sums[l] += values[e + l];
  }
  for (int64_t l = 0; l < kRowLanes; ++l) sum += sums[l];
  return sum;
}

// The same with the scores as well, for one exp of each logit. A NaN inside makes all of them NaN.
template <typename acc_t>
MOE_CPU_CLONES SoftmaxRow<acc_t> softmax_into(const acc_t* logits, int64_t padded, acc_t* scores) {
  acc_t best[kRowLanes];
  for (int64_t l = 0; l < kRowLanes; ++l) best[l] = -std::numeric_limits<acc_t>::infinity();
  for (int64_t e = 0; e < padded; e += kRowLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) best[l] = logits[e + l] > best[l] ? logits[e + l] : best[l];
  }
  acc_t largest = best[0];
  for (int64_t l = 1; l < kRowLanes; ++l) largest = best[l] > largest ? best[l] : largest;
  for (int64_t e = 0; e < padded; ++e) scores[e] = exp_of_difference(logits[e] - largest);
  const acc_t sum = sum_of_row(scores, padded), factor = acc_t(1) / sum;
  for (int64_t e = 0; e < padded; ++e) scores[e] *= factor;
  return {largest, sum};
}

// Works in place too.
template <typename acc_t>
MOE_CPU_CLONES void softmax_scores(const acc_t* logits, SoftmaxRow<acc_t> softmax, int64_t size, acc_t* scores) {
  for (int64_t e = 0; e < size; ++e) scores[e] = exp_of_difference(logits[e] - softmax.largest) / softmax.sum;
}

// False if a logit lies where the vectorisable exp ends; the caller then scores the row again.
template <typename acc_t>
MOE_CPU_CLONES bool sigmoid_scores(const acc_t* logits, int64_t size, acc_t* scores) {
  int outside = 0;
  for (int64_t e = 0; e < size; ++e) {
    outside |= !(logits[e] > acc_t(-87));
    scores[e] = acc_t(1) / (acc_t(1) + exp_of(-logits[e]));
  }
  return outside == 0;
}

template <typename acc_t>
void elementwise_scores(ScoreFunction function, const acc_t* logits, int64_t size, acc_t* scores) {
  if (function == ScoreFunction::kSigmoid && sigmoid_scores(logits, size, scores)) return;
  for (int64_t e = 0; e < size; ++e) scores[e] = elementwise_score(function, logits[e]);
}

template <typename acc_t>
MOE_CPU_CLONES void sigmoid_slopes(const acc_t* scores, int64_t size, acc_t* slopes) {
  for (int64_t e = 0; e < size; ++e) slopes[e] = scores[e] * (acc_t(1) - scores[e]);
}

// d score / d logit of what elementwise_scores scored. Works in place too.
template <typename acc_t>
void score_slopes(ScoreFunction function, const acc_t* logits, const acc_t* scores, int64_t size, acc_t* slopes) {
  if (function == ScoreFunction::kSigmoid) return sigmoid_slopes(scores, size, slopes);
  for (int64_t e = 0; e < size; ++e) slopes[e] = elementwise_score_gradient(function, logits[e]);
}

// ---- selection: keys are ordered_key(value), at least 1; 0 is no candidate
template <typename acc_t>
using ordered_key_t = decltype(ordered_key(acc_t()));

template <typename key_t>
MOE_HOST_DEVICE_INLINE key_t largest_of_lanes(const key_t* keys) {
  key_t best = 0;
  for (int64_t l = 0; l < kRowLanes; ++l) best = keys[l] > best ? keys[l] : best;
  return best;
}

// The `count` largest of the padded row in descending order, ties to the lower position, -1 where none is left. Takes
// them out of `keys`. Only the lanes that lost their maximum are looked at again: padded + count * (padded / 16 + 32).
template <typename key_t>
MOE_CPU_CLONES void take_largest(key_t* keys, int64_t padded, key_t* maxima, int64_t count, int32_t* positions) {
  const int64_t num_blocks = padded / kRowLanes;
  for (int64_t b = 0; b < num_blocks; ++b) maxima[b] = largest_of_lanes(keys + b * kRowLanes);
  for (int64_t i = 0; i < count; ++i) {
    key_t best = 0;
    int64_t block = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
      block = maxima[b] > best ? b : block;
      best = maxima[b] > best ? maxima[b] : best;
    }
    if (best == 0) {
      std::fill(positions + i, positions + count, -1);
      return;
    }
    key_t* lanes = keys + block * kRowLanes;
    int64_t lane = 0;
    for (int64_t l = kRowLanes - 1; l >= 0; --l) lane = lanes[l] == best ? l : lane;
    positions[i] = static_cast<int32_t>(block * kRowLanes + lane);
    lanes[lane] = 0;
    maxima[block] = largest_of_lanes(lanes);
  }
}

}  // namespace moe_ext::cpu
