// Scores are written token by token into the weights, then every expert finds the threshold of its choice in its column
// by radix select, then every token keeps the scores that pass.
#include "expert_choice_gating.h"

#include <torch/csrc/stable/library.h>

#include "row_cpu.h"

namespace moe_ext::cpu {
namespace {

// Experts whose columns are gathered together: one cache line of float scores.
constexpr int64_t kColumnsTogether = 16;
constexpr int kDigitBits = 11;

// One token's row, padded to whole lanes. A NaN logit makes its own score NaN and takes no part in the softmax, as in
// topk_gating.
template <typename acc_t>
struct TokenRow {
  std::vector<acc_t> logits, taking_part;
  explicit TokenRow(int64_t num_experts) : logits(padded_row(num_experts)), taking_part(logits.size()) {
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

template <typename scalar_t, typename acc_t>
void score_token(TokenRow<acc_t>& row, const scalar_t* source, const ExpertChoiceShape& shape, acc_t* scores) {
  read_row(source, shape.num_experts, row.logits.data(), row.taking_part.data());
  if (shape.score_function == ScoreFunction::kSoftmax) {
    const SoftmaxRow<acc_t> softmax =
        softmax_of_row(row.taking_part.data(), static_cast<int64_t>(row.taking_part.size()));
    softmax_scores(row.logits.data(), softmax, shape.num_experts, scores);
  } else {
    elementwise_scores(shape.score_function, row.logits.data(), shape.num_experts, scores);
  }
}

// + 0 makes one zero of the two.
template <typename acc_t>
MOE_HOST_DEVICE_INLINE ordered_key_t<acc_t> key_of(acc_t score) {
  return ordered_key(score + acc_t(0));
}

// What an expert takes: every key above `key`, and `key` itself up to this token. -1: none at the threshold.
template <typename key_t>
struct Threshold {
  key_t key;
  int64_t last_tied_token;
};

// The wanted-th largest of the keys and the last of the tokens tied with it that the choice still admits. Radix select
// from the top digit down; `candidates` is scratch and loses, digit by digit, what the threshold is known to differ
// from.
template <typename key_t>
Threshold<key_t> find_threshold(const std::vector<key_t>& keys, int64_t wanted, std::vector<key_t>& candidates) {
  candidates = keys;
  constexpr int kBits = static_cast<int>(sizeof(key_t) * 8);
  std::vector<int32_t> histogram(size_t{1} << kDigitBits);
  for (int top = kBits; top > 0; top -= kDigitBits) {
    const int shift = std::max(0, top - kDigitBits);
    const key_t digit_mask = (key_t{1} << (top - shift)) - 1;
    std::fill(histogram.begin(), histogram.end(), 0);
    for (const key_t key : candidates) ++histogram[key >> shift & digit_mask];
    key_t digit = digit_mask;
    while (histogram[digit] < wanted) wanted -= histogram[digit--];
    std::erase_if(candidates, [&](key_t key) { return (key >> shift & digit_mask) != digit; });
  }
  Threshold<key_t> threshold{candidates.front(), -1};
  for (int64_t left = wanted, token = 0; left > 0; ++token) {
    if (keys[token] != threshold.key) continue;
    threshold.last_tied_token = token;
    --left;
  }
  return threshold;
}

template <typename acc_t>
void find_thresholds(const acc_t* scores, const ExpertChoiceShape& shape, int64_t first_expert, int64_t end_expert,
                     Threshold<ordered_key_t<acc_t>>* thresholds) {
  using key_t = ordered_key_t<acc_t>;
  std::vector<std::vector<key_t>> columns(std::min(kColumnsTogether, end_expert - first_expert),
                                          std::vector<key_t>(shape.num_tokens));
  std::vector<key_t> candidates;
  for (int64_t first = first_expert; first < end_expert; first += kColumnsTogether) {
    const int64_t count = std::min(kColumnsTogether, end_expert - first);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t c = 0; c < count; ++c) columns[c][t] = key_of(scores[t * shape.num_experts + first + c]);
    }
    for (int64_t c = 0; c < count; ++c) {
      thresholds[first + c] = find_threshold(columns[c], shape.capacity, candidates);
    }
  }
}

template <typename acc_t>
MOE_CPU_CLONES void keep_chosen(const Threshold<ordered_key_t<acc_t>>* thresholds, int64_t token, int64_t num_experts,
                                acc_t* weights, int32_t* ids) {
  for (int64_t e = 0; e < num_experts; ++e) {
    const auto key = key_of(weights[e]);
    const bool chosen = key > thresholds[e].key || (key == thresholds[e].key && token <= thresholds[e].last_tied_token);
    weights[e] = chosen ? weights[e] : acc_t(0);
    ids[e] = chosen ? static_cast<int32_t>(e) : -1;
  }
}

template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void backward_row(ScoreFunction function, const acc_t* logits, const acc_t* scores, const int32_t* ids,
                                 const acc_t* grad, int64_t num_experts, scalar_t* grad_logits) {
  const bool softmax = function == ScoreFunction::kSoftmax;
  acc_t dot = 0;
  for (int64_t e = 0; softmax && e < num_experts; ++e) dot += ids[e] == e ? grad[e] * scores[e] : acc_t(0);
  for (int64_t e = 0; e < num_experts; ++e) {
    const acc_t slope = softmax ? scores[e] : elementwise_score_gradient(function, logits[e]);
    const acc_t gradient = slope * ((ids[e] == e ? grad[e] : acc_t(0)) - dot);
    const bool unused_nan = logits[e] != logits[e] && ids[e] != e;
    grad_logits[e] = static_cast<scalar_t>(unused_nan ? acc_t(0) : gradient);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> expert_choice_gating(const Tensor& logits, int64_t capacity,
                                                const std::string& score_function) {
  const ExpertChoiceShape shape = check_expert_choice_gating(logits, capacity, score_function);
  const Tensor source = torch::stable::contiguous(logits);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {shape.num_tokens, shape.num_experts}, router_dtype(logits.scalar_type()));
  Tensor topk_ids = torch::stable::new_empty(logits, {shape.num_tokens, shape.num_experts}, ScalarType::Int);
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
    // No key is above the largest: the thresholds of a choice of nobody.
    std::vector<Threshold<key_t>> thresholds(shape.num_experts, {std::numeric_limits<key_t>::max(), -1});
    if (shape.capacity > 0) {
      parallel_rows(shape.num_experts, shape.num_tokens * kBytesPerScore, [&](int64_t begin, int64_t end) {
        find_thresholds(weights, shape, begin, end, thresholds.data());
      });
    }
    parallel_rows(shape.num_tokens, bytes_per_token, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * shape.num_experts;
        keep_chosen(thresholds.data(), t, shape.num_experts, weights + first, ids + first);
      }
    });
  });
  return {topk_weights, topk_ids};
}

Tensor expert_choice_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                                     const std::string& score_function) {
  const ExpertChoiceShape shape =
      check_expert_choice_gating_backward(grad_topk_weights, logits, topk_ids, score_function);
  const Tensor source = torch::stable::contiguous(logits), gradient = torch::stable::contiguous(grad_topk_weights);
  const Tensor chosen = torch::stable::contiguous(topk_ids);
  Tensor grad_logits = torch::stable::new_empty(logits, {shape.num_tokens, shape.num_experts});
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
