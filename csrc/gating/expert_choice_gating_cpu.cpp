#include "expert_choice_gating.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/cpu_parallel.h"

namespace moe_ext::cpu {
namespace {

// Scores of one token. A NaN logit makes its own score NaN and takes no part in the softmax, as in topk_gating.
template <typename scalar_t, typename acc_t>
void score_token(const scalar_t* row, const ExpertChoiceShape& shape, acc_t* scores) {
  if (shape.score_function != ScoreFunction::kSoftmax) {
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      scores[e] = elementwise_score(shape.score_function, static_cast<acc_t>(row[e]));
    }
    return;
  }
  SoftmaxRow<acc_t> softmax{-std::numeric_limits<acc_t>::infinity(), acc_t(0)};
  for (int64_t e = 0; e < shape.num_experts; ++e)
    softmax.largest = std::max(softmax.largest, static_cast<acc_t>(row[e]));
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    if (!std::isnan(static_cast<acc_t>(row[e]))) softmax.sum += std::exp(static_cast<acc_t>(row[e]) - softmax.largest);
  }
  for (int64_t e = 0; e < shape.num_experts; ++e) scores[e] = softmax.probability(static_cast<acc_t>(row[e]));
}

// The expert's best tokens: highest score, NaN last, ties to the earlier token.
template <typename acc_t>
void choose_tokens(const std::vector<acc_t>& scores, int64_t expert, const ExpertChoiceShape& shape,
                   std::vector<int64_t>& tokens) {
  tokens.resize(shape.num_tokens);
  for (int64_t t = 0; t < shape.num_tokens; ++t) tokens[t] = t;
  if (shape.capacity == shape.num_tokens) return;
  std::nth_element(tokens.begin(), tokens.begin() + shape.capacity, tokens.end(), [&](int64_t a, int64_t b) {
    const acc_t score_a = scores[a * shape.num_experts + expert], score_b = scores[b * shape.num_experts + expert];
    const bool nan_a = std::isnan(score_a), nan_b = std::isnan(score_b);
    if (nan_a != nan_b) return nan_b;
    if (!nan_a && score_a != score_b) return score_a > score_b;
    return a < b;
  });
  tokens.resize(shape.capacity);
}

constexpr int64_t kBytesPerScore = 64;  // exp and friends cost about this many bytes' worth of copying

}  // namespace

std::tuple<Tensor, Tensor> expert_choice_gating(const Tensor& logits, int64_t capacity,
                                                const std::string& score_function) {
  const ExpertChoiceShape shape = check_expert_choice_gating(logits, capacity, score_function);
  const Tensor source = torch::stable::contiguous(logits);
  Tensor topk_weights =
      torch::stable::new_zeros(logits, {shape.num_tokens, shape.num_experts}, router_dtype(logits.scalar_type()));
  Tensor topk_ids = torch::stable::new_empty(logits, {shape.num_tokens, shape.num_experts}, ScalarType::Int);
  auto* ids = topk_ids.mutable_data_ptr<int32_t>();
  std::fill_n(ids, topk_ids.numel(), -1);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    auto* weights = topk_weights.mutable_data_ptr<acc_t>();
    std::vector<acc_t> scores(logits.numel());
    parallel_rows(shape.num_tokens, shape.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        score_token(logit + t * shape.num_experts, shape, scores.data() + t * shape.num_experts);
      }
    });
    parallel_rows(shape.num_experts, shape.num_tokens * kBytesPerScore, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> tokens;
      for (int64_t expert = begin; expert < end; ++expert) {
        choose_tokens(scores, expert, shape, tokens);
        for (const int64_t token : tokens) {
          weights[token * shape.num_experts + expert] = scores[token * shape.num_experts + expert];
          ids[token * shape.num_experts + expert] = static_cast<int32_t>(expert);
        }
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
      std::vector<acc_t> scores(shape.num_experts);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first = t * shape.num_experts;
        score_token(logit + first, shape, scores.data());
        const bool softmax = shape.score_function == ScoreFunction::kSoftmax;
        acc_t dot = 0;
        for (int64_t e = 0; softmax && e < shape.num_experts; ++e) {
          if (ids[first + e] == e) dot += grad[first + e] * scores[e];
        }
        for (int64_t e = 0; e < shape.num_experts; ++e) {
          const acc_t logit_e = static_cast<acc_t>(logit[first + e]);
          const acc_t grad_score = ids[first + e] == e ? grad[first + e] : acc_t(0);
          const bool unused_nan = std::isnan(logit_e) && ids[first + e] != e;
          const acc_t slope = softmax ? scores[e] : elementwise_score_gradient(shape.score_function, logit_e);
          destination[first + e] = static_cast<scalar_t>(unused_nan ? acc_t(0) : slope * (grad_score - dot));
        }
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
