// Scores are written token by token into the weights, then every expert finds the threshold of its choice in its column
// by bisection, then every token keeps the scores that pass.
#include "expert_choice_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "row_cpu.h"

namespace moe_ext::cpu {
namespace {

// Experts whose columns are gathered together: one cache line of float scores.
constexpr int64_t kColumnsTogether = 16;

// One token's row, padded to whole lanes. A NaN logit makes its own score NaN and takes no part in the softmax, as in
// topk_gating.
template <typename acc_t>
struct TokenRow {
  std::vector<acc_t> logits, taking_part, scores;
  explicit TokenRow(int64_t num_experts)
      : logits(padded_row(num_experts)), taking_part(logits.size()), scores(logits.size()) {
    std::fill(taking_part.begin(), taking_part.end(), -std::numeric_limits<acc_t>::infinity());
  }
};

template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void read_row(const scalar_t* source, int64_t num_experts, acc_t* logits, acc_t* taking_part) {
  for (int64_t e = 0; e < num_experts; ++e) {
    logits[e] = static_cast<acc_t>(source[e]);
    taking_part[e] = logits[e] == logits[e] ? logits[e] : -std::numeric_limits<acc_t>::infinity();
  }
}

template <typename acc_t>
MOE_CPU_CLONES void spread_nan(const acc_t* logits, const acc_t* source, int64_t num_experts, acc_t* scores) {
  for (int64_t e = 0; e < num_experts; ++e) scores[e] = logits[e] == logits[e] ? source[e] : logits[e];
}

template <typename scalar_t, typename acc_t>
void score_token(TokenRow<acc_t>& row, const scalar_t* source, const ExpertChoiceShape& shape, acc_t* scores) {
  read_row(source, shape.num_experts, row.logits.data(), row.taking_part.data());
  if (shape.score_function == ScoreFunction::kSoftmax) {
    softmax_into(row.taking_part.data(), static_cast<int64_t>(row.taking_part.size()), row.scores.data());
    spread_nan(row.logits.data(), row.scores.data(), shape.num_experts, scores);
  } else {
    elementwise_scores(shape.score_function, row.logits.data(), shape.num_experts, scores);
  }
}

// + 0 makes one zero of the two.
template <typename acc_t>
MOE_HOST_DEVICE_INLINE ordered_key_t<acc_t> key_of(acc_t score) {
  return ordered_key(score + acc_t(0));
}

// What each expert takes: every key above `keys`, and that key itself up to `last_tied_tokens`, a token + 1.
template <typename key_t>
struct Thresholds {
  std::vector<key_t> keys, last_tied_tokens;
  // No key is above the largest: the thresholds of a choice of nobody.
  explicit Thresholds(int64_t num_experts)
      : keys(num_experts, std::numeric_limits<key_t>::max()), last_tied_tokens(num_experts, 0) {}
};

template <typename key_t>
MOE_HOST_DEVICE_INLINE int64_t count_from(const key_t* keys, int64_t size, key_t lowest) {
  key_t count = 0;  // as wide as a key, so that the loop vectorises
  for (int64_t t = 0; t < size; ++t) count += keys[t] >= lowest ? 1 : 0;
  return static_cast<int64_t>(count);
}

// The wanted-th largest key, 1 <= wanted <= size: the highest value that so many keys reach.
template <typename key_t>
MOE_CPU_CLONES key_t nth_largest(const key_t* keys, int64_t size, int64_t wanted) {
  key_t low = keys[0], high = keys[0];
  for (int64_t t = 0; t < size; ++t) {
    low = keys[t] < low ? keys[t] : low;
    high = keys[t] > high ? keys[t] : high;
  }
  // All keys reach low; after the loop fewer than wanted reach low + 1.
  while (low < high) {
    const key_t middle = low + (high - low) / 2 + 1;
    const int64_t count = count_from(keys, size, middle);
    if (count < wanted) {
      high = middle - 1;
      continue;
    }
    low = middle;
    if (count > wanted) continue;
    // Exactly the wanted keys are left: the least of them is it.
    key_t least = high;
    for (int64_t t = 0; t < size; ++t) least = keys[t] >= middle && keys[t] < least ? keys[t] : least;
    return least;
  }
  return low;
}

// The last token that is admitted with a key at the threshold, + 1.
template <typename key_t>
key_t last_tied_token(const key_t* keys, int64_t size, int64_t wanted, key_t threshold, int64_t above) {
  int64_t left = wanted - above, token = 0;
  for (; left > 0 && token < size; ++token) left -= keys[token] == threshold ? 1 : 0;
  return static_cast<key_t>(token);
}

template <typename key_t>
MOE_CPU_CLONES int64_t count_above(const key_t* keys, int64_t size, key_t threshold) {
  return threshold == std::numeric_limits<key_t>::max() ? 0 : count_from(keys, size, static_cast<key_t>(threshold + 1));
}

// keys = a few neighbouring columns of the scores, one every `stride`.
template <typename acc_t>
MOE_CPU_CLONES void gather_columns(const acc_t* scores, int64_t num_tokens, int64_t num_experts, int64_t count,
                                   int64_t stride, ordered_key_t<acc_t>* keys) {
  // Square blocks: keys are made row by row and leave column by column.
  ordered_key_t<acc_t> block[kColumnsTogether][kColumnsTogether] = {};
  for (int64_t first = 0; first < num_tokens; first += kColumnsTogether) {
    const int64_t tokens = std::min(kColumnsTogether, num_tokens - first);
    for (int64_t t = 0; t < tokens; ++t) {
      const acc_t* row = scores + (first + t) * num_experts;
      for (int64_t c = 0; c < count; ++c) block[t][c] = key_of(row[c]);
    }
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t t = 0; t < tokens; ++t) keys[c * stride + first + t] = block[t][c];
    }
  }
}

template <typename acc_t>
void find_thresholds(const acc_t* scores, const ExpertChoiceShape& shape, int64_t first_expert, int64_t end_expert,
                     Thresholds<ordered_key_t<acc_t>>& thresholds) {
  // Columns begin a cache line apart, else those of a power of two of tokens would all fall into one set of L1.
  const int64_t num_tokens = shape.num_tokens, stride = padded_row(num_tokens) + kRowLanes;
  std::vector<ordered_key_t<acc_t>> columns(kColumnsTogether * stride);
  for (int64_t first = first_expert; first < end_expert; first += kColumnsTogether) {
    const int64_t count = std::min(kColumnsTogether, end_expert - first);
    gather_columns(scores + first, num_tokens, shape.num_experts, count, stride, columns.data());
    for (int64_t c = 0; c < count; ++c) {
      const auto* keys = columns.data() + c * stride;
      const auto threshold = nth_largest(keys, num_tokens, shape.capacity);
      const int64_t above = count_above(keys, num_tokens, threshold);
      thresholds.keys[first + c] = threshold;
      thresholds.last_tied_tokens[first + c] = last_tied_token(keys, num_tokens, shape.capacity, threshold, above);
    }
  }
}

template <typename acc_t>
MOE_CPU_CLONES void keep_chosen(const ordered_key_t<acc_t>* thresholds, const ordered_key_t<acc_t>* last_tied_tokens,
                                ordered_key_t<acc_t> token, int64_t num_experts, acc_t* weights, int32_t* ids) {
  for (int64_t e = 0; e < num_experts; ++e) {
    const auto key = key_of(weights[e]);
    const bool chosen = (key > thresholds[e]) | ((key == thresholds[e]) & (token < last_tied_tokens[e]));
    weights[e] = chosen ? weights[e] : acc_t(0);
    ids[e] = chosen ? static_cast<int32_t>(e) : -1;
  }
}

// d loss / d logit of one token from the slopes of its scores; `dot` couples the experts of a softmax, else it is 0.
template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void row_gradient(const acc_t* logits, const acc_t* slopes, const int32_t* ids, const acc_t* grad,
                                 acc_t dot, int64_t num_experts, scalar_t* grad_logits) {
  for (int64_t e = 0; e < num_experts; ++e) {
    const bool chosen = ids[e] == static_cast<int32_t>(e);
    const acc_t gradient = slopes[e] * ((chosen ? grad[e] : acc_t(0)) - dot);
    grad_logits[e] = static_cast<scalar_t>((logits[e] != logits[e]) & !chosen ? acc_t(0) : gradient);
  }
}

template <typename acc_t>
MOE_CPU_CLONES acc_t chosen_dot(const acc_t* scores, const int32_t* ids, const acc_t* grad, int64_t num_experts) {
  acc_t sums[kRowLanes] = {}, dot = 0;
  int64_t e = 0;
  for (; e + kRowLanes <= num_experts; e += kRowLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) {
      sums[l] += ids[e + l] == static_cast<int32_t>(e + l) ? grad[e + l] * scores[e + l] : acc_t(0);
    }
  }
  for (int64_t l = 0; e < num_experts; ++e, ++l) {
    sums[l] += ids[e] == static_cast<int32_t>(e) ? grad[e] * scores[e] : acc_t(0);
  }
  for (int64_t l = 0; l < kRowLanes; ++l) dot += sums[l];
  return dot;
}

// `scores` become slopes.
template <typename scalar_t, typename acc_t>
void backward_row(ScoreFunction function, const acc_t* logits, acc_t* scores, const int32_t* ids, const acc_t* grad,
                  int64_t num_experts, scalar_t* grad_logits) {
  acc_t dot = 0;
  if (function == ScoreFunction::kSoftmax) {
    dot = chosen_dot(scores, ids, grad, num_experts);
  } else {
    score_slopes(function, logits, scores, num_experts, scores);
  }
  row_gradient(logits, scores, ids, grad, dot, num_experts, grad_logits);
}

}  // namespace

std::tuple<Tensor, Tensor> expert_choice_gating(const Tensor& logits, int64_t capacity,
                                                const std::string& score_function) {
  const ExpertChoiceShape shape = check_expert_choice_gating(logits, capacity, score_function);
  const Tensor source = as_contiguous(logits);
  Tensor topk_weights = make_tensor(logits, {shape.num_tokens, shape.num_experts}, router_dtype(logits.scalar_type()));
  Tensor topk_ids = make_tensor(logits, {shape.num_tokens, shape.num_experts}, ScalarType::Int);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    using key_t = ordered_key_t<acc_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    auto* weights = topk_weights.mutable_data_ptr<acc_t>();
    auto* ids = topk_ids.mutable_data_ptr<int32_t>();
    const int64_t bytes_per_token = shape.num_experts * kBytesPerScore;
    parallel_rows(shape.num_tokens, bytes_per_token, [&](int64_t begin, int64_t end) {
      TokenRow<acc_t> row(shape.num_experts);
      for (int64_t t = begin; t < end; ++t) {
        score_token(row, logit + t * shape.num_experts, shape, weights + t * shape.num_experts);
      }
    });
    Thresholds<key_t> thresholds(shape.num_experts);
    if (shape.capacity > 0) {
      parallel_rows(shape.num_experts, shape.num_tokens * kBytesPerScore,
                    [&](int64_t begin, int64_t end) { find_thresholds(weights, shape, begin, end, thresholds); });
    }
    parallel_rows(shape.num_tokens, bytes_per_token, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * shape.num_experts;
        keep_chosen(thresholds.keys.data(), thresholds.last_tied_tokens.data(), static_cast<key_t>(t),
                    shape.num_experts, weights + first, ids + first);
      }
    });
  });
  return {topk_weights, topk_ids};
}

Tensor expert_choice_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                                     const std::string& score_function) {
  const ExpertChoiceShape shape =
      check_expert_choice_gating_backward(grad_topk_weights, logits, topk_ids, score_function);
  const Tensor source = as_contiguous(logits), gradient = as_contiguous(grad_topk_weights);
  const Tensor chosen = as_contiguous(topk_ids);
  Tensor grad_logits = make_tensor(logits, {shape.num_tokens, shape.num_experts});
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    const auto* grad = gradient.const_data_ptr<acc_t>();
    const auto* ids = chosen.const_data_ptr<int32_t>();
    auto* destination = grad_logits.mutable_data_ptr<scalar_t>();
    parallel_rows(shape.num_tokens, shape.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      TokenRow<acc_t> row(shape.num_experts);
      std::vector<acc_t> scores(shape.num_experts);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * shape.num_experts;
        score_token(row, logit + first, shape, scores.data());
        backward_row(shape.score_function, row.logits.data(), scores.data(), ids + first, grad + first,
                     shape.num_experts, destination + first);
      }
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("expert_choice_gating", TORCH_BOX(&moe_ext::cpu::expert_choice_gating));
  m.impl("expert_choice_gating_backward", TORCH_BOX(&moe_ext::cpu::expert_choice_gating_backward));
}
