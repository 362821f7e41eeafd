#include "topk_gating.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/optional_tensor.h"

namespace moe_ext::cpu {
namespace {

// One token's row in the accumulation type, and what is derived from it.
template <typename acc_t>
struct Row {
  std::vector<acc_t> logits, scores, keys;
  std::vector<int32_t> order;
  std::vector<char> allowed;
  SoftmaxRow<acc_t> softmax;

  explicit Row(int64_t num_experts)
      : logits(num_experts), scores(num_experts), keys(num_experts), order(num_experts), allowed(num_experts) {}
};

template <typename scalar_t, typename acc_t>
void read_row(Row<acc_t>& row, const scalar_t* logits, const bool* mask, const GateOptions& options, int64_t token) {
  const int64_t num_experts = options.num_experts;
  for (int64_t e = 0; e < num_experts; ++e) row.logits[e] = static_cast<acc_t>(logits[token * num_experts + e]);
  for (int64_t e = 0; e < num_experts; ++e) row.allowed[e] = !mask || mask[token * options.mask_stride + e];
}

// The softmax over the experts that take part: allowed, and not NaN (a NaN logit makes its own score NaN, no other).
template <typename acc_t, typename Experts>
SoftmaxRow<acc_t> softmax_over(const std::vector<acc_t>& logits, const Experts& experts) {
  SoftmaxRow<acc_t> softmax{-std::numeric_limits<acc_t>::infinity(), acc_t(0)};
  for (const auto e : experts) softmax.largest = std::max(softmax.largest, logits[e]);
  for (const auto e : experts) softmax.sum += std::exp(logits[e] - softmax.largest);
  return softmax;
}

template <typename acc_t>
void score_row(Row<acc_t>& row, const GateOptions& options) {
  if (options.score_function != ScoreFunction::kSoftmax) {
    for (size_t e = 0; e < row.logits.size(); ++e) {
      row.scores[e] = elementwise_score(options.score_function, row.logits[e]);
    }
    return;
  }
  if (options.select_then_score) {
    row.scores = row.logits;
    return;
  }
  std::vector<int32_t> taking_part;
  for (size_t e = 0; e < row.logits.size(); ++e) {
    if (row.allowed[e] && !std::isnan(row.logits[e])) taking_part.push_back(static_cast<int32_t>(e));
  }
  row.softmax = softmax_over(row.logits, taking_part);
  for (size_t e = 0; e < row.logits.size(); ++e) row.scores[e] = row.softmax.probability(row.logits[e]);
}

// Keeps the experts of the best groups. A group's score is the sum of its two best keys (DeepSeek-V3).
template <typename acc_t>
void limit_to_groups(Row<acc_t>& row, const GateOptions& options) {
  const int64_t group_size = options.num_experts / options.num_groups;
  const acc_t lowest = -std::numeric_limits<acc_t>::infinity();
  std::vector<acc_t> group_scores(options.num_groups);
  std::vector<int64_t> order(options.num_groups);
  for (int64_t g = 0; g < options.num_groups; ++g) {
    acc_t best = lowest, second = lowest;
    for (int64_t e = g * group_size; e < (g + 1) * group_size; ++e) {
      if (!row.allowed[e] || std::isnan(row.keys[e])) continue;
      if (row.keys[e] > best) {
        second = best;
        best = row.keys[e];
      } else if (row.keys[e] > second) {
        second = row.keys[e];
      }
    }
    group_scores[g] = second == lowest ? best : best + second;
    order[g] = g;
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return group_scores[a] > group_scores[b]; });
  for (int64_t i = options.topk_groups; i < options.num_groups; ++i) {
    std::fill_n(row.allowed.begin() + order[i] * group_size, group_size, char(0));
  }
}

// The topk experts in descending key, NaN last, ties to the lower id, -1 where too few are allowed.
template <typename acc_t>
void select(Row<acc_t>& row, const acc_t* bias, const GateOptions& options, int32_t* ids) {
  const int64_t num_experts = options.num_experts;
  const bool grouped = options.topk_groups < options.num_groups;
  for (int64_t e = 0; e < num_experts; ++e) row.keys[e] = row.scores[e] + (bias ? bias[e] : acc_t(0));
  if (grouped) limit_to_groups(row, options);
  // Without a bias the order of the scores is the order of the logits, where rounding makes no ties.
  if (!bias) row.keys = row.logits;
  int64_t candidates = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (row.allowed[e]) row.order[candidates++] = static_cast<int32_t>(e);
  }
  const int64_t found = std::min(options.topk, candidates);
  std::partial_sort(row.order.begin(), row.order.begin() + found, row.order.begin() + candidates,
                    [&](int32_t a, int32_t b) {
                      const bool nan_a = std::isnan(row.keys[a]), nan_b = std::isnan(row.keys[b]);
                      if (nan_a != nan_b) return nan_b;
                      if (!nan_a && row.keys[a] != row.keys[b]) return row.keys[a] > row.keys[b];
                      return a < b;
                    });
  std::copy_n(row.order.begin(), found, ids);
  std::fill(ids + found, ids + options.topk, -1);
}

std::vector<int32_t> chosen_experts(const int32_t* ids, const GateOptions& options) {
  std::vector<int32_t> chosen;
  for (int64_t j = 0; j < options.topk; ++j) {
    if (ids[j] >= 0 && ids[j] < options.num_experts) chosen.push_back(ids[j]);
  }
  return chosen;
}

// Unscaled, not renormalised weights of the chosen slots; 0 for slots without an expert.
template <typename acc_t>
void raw_weights(const Row<acc_t>& row, const int32_t* ids, const GateOptions& options, acc_t* weights) {
  SoftmaxRow<acc_t> softmax = row.softmax;
  const bool over_selected = options.select_then_score && options.score_function == ScoreFunction::kSoftmax;
  if (over_selected) softmax = softmax_over(row.logits, chosen_experts(ids, options));
  for (int64_t j = 0; j < options.topk; ++j) {
    const bool here = ids[j] >= 0 && ids[j] < options.num_experts;
    weights[j] = !here ? acc_t(0) : over_selected ? softmax.probability(row.logits[ids[j]]) : row.scores[ids[j]];
  }
}

template <typename acc_t>
acc_t renormalizer(const acc_t* weights, const GateOptions& options) {
  acc_t sum = 0;
  for (int64_t j = 0; j < options.topk; ++j) sum += weights[j];
  return sum + static_cast<acc_t>(options.renormalize_eps);
}

template <typename acc_t>
void finish_weights(acc_t* weights, const GateOptions& options) {
  acc_t factor = static_cast<acc_t>(options.scale);
  if (options.renormalize) {
    const acc_t sum = renormalizer(weights, options);
    factor = sum == acc_t(0) ? acc_t(0) : factor / sum;
  }
  for (int64_t j = 0; j < options.topk; ++j) weights[j] *= factor;
}

// d loss / d raw weight, from d loss / d final weight.
template <typename acc_t>
void weight_gradients(const acc_t* raw, const acc_t* grad, const GateOptions& options, acc_t* grad_raw) {
  const acc_t scale = static_cast<acc_t>(options.scale);
  acc_t sum = 1, dot = 0;
  if (options.renormalize) {
    sum = renormalizer(raw, options);
    for (int64_t j = 0; j < options.topk; ++j) dot += grad[j] * raw[j];
  }
  for (int64_t j = 0; j < options.topk; ++j) {
    grad_raw[j] = sum == acc_t(0) ? acc_t(0) : scale * (grad[j] - dot / sum) / sum;
  }
}

template <typename scalar_t, typename acc_t>
void backward_row(Row<acc_t>& row, const int32_t* ids, const acc_t* grad, const GateOptions& options,
                  std::vector<acc_t>& raw, std::vector<acc_t>& grad_raw, scalar_t* grad_logits) {
  raw_weights(row, ids, options, raw.data());
  weight_gradients(raw.data(), grad, options, grad_raw.data());
  const bool softmax = options.score_function == ScoreFunction::kSoftmax;
  acc_t dot = 0;
  for (int64_t j = 0; softmax && j < options.topk; ++j) dot += grad_raw[j] * raw[j];
  for (int64_t e = 0; e < options.num_experts; ++e) {
    const bool spreads = softmax && !options.select_then_score && row.allowed[e] && !std::isnan(row.logits[e]);
    grad_logits[e] = static_cast<scalar_t>(spreads ? -dot * row.scores[e] : acc_t(0));
  }
  for (int64_t j = 0; j < options.topk; ++j) {
    const int64_t e = ids[j];
    if (e < 0 || e >= options.num_experts) continue;
    grad_logits[e] = static_cast<scalar_t>(
        softmax ? raw[j] * (grad_raw[j] - dot)
                : grad_raw[j] * elementwise_score_gradient(options.score_function, row.logits[e]));
  }
}

// exp and friends cost about this many bytes' worth of copying.
constexpr int64_t kBytesPerScore = 64;

}  // namespace

std::tuple<Tensor, Tensor> topk_gating(const Tensor& logits, int64_t topk, const std::string& score_function,
                                       const std::string& score_order, const std::optional<Tensor>& selection_bias,
                                       const std::optional<Tensor>& expert_mask, int64_t num_groups,
                                       int64_t topk_groups, bool renormalize, double renormalize_eps, double scale) {
  const GateOptions options = check_topk_gating(logits, topk, score_function, score_order, selection_bias, expert_mask,
                                                num_groups, topk_groups, renormalize, renormalize_eps, scale);
  const Tensor source = torch::stable::contiguous(logits);
  const std::optional<Tensor> bias = contiguous_if_any(selection_bias), mask = contiguous_if_any(expert_mask);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {options.num_tokens, topk}, router_dtype(logits.scalar_type()));
  Tensor topk_ids = torch::stable::new_empty(logits, {options.num_tokens, topk}, ScalarType::Int);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    const acc_t* bias_of = bias ? bias->const_data_ptr<acc_t>() : nullptr;
    const bool* mask_of = mask ? mask->const_data_ptr<bool>() : nullptr;
    auto* weights = topk_weights.mutable_data_ptr<acc_t>();
    auto* ids = topk_ids.mutable_data_ptr<int32_t>();
    parallel_rows(options.num_tokens, options.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      Row<acc_t> row(options.num_experts);
      for (int64_t token = begin; token < end; ++token) {
        read_row(row, logit, mask_of, options, token);
        score_row(row, options);
        select(row, bias_of, options, ids + token * topk);
        raw_weights(row, ids + token * topk, options, weights + token * topk);
        finish_weights(weights + token * topk, options);
      }
    });
  });
  return {topk_weights, topk_ids};
}

Tensor topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                            const std::string& score_function, const std::string& score_order,
                            const std::optional<Tensor>& expert_mask, bool renormalize, double renormalize_eps,
                            double scale) {
  const GateOptions options = check_topk_gating_backward(grad_topk_weights, logits, topk_ids, score_function,
                                                         score_order, expert_mask, renormalize, renormalize_eps, scale);
  const Tensor gradient = torch::stable::contiguous(grad_topk_weights), source = torch::stable::contiguous(logits);
  const Tensor chosen = torch::stable::contiguous(topk_ids);
  const std::optional<Tensor> mask = contiguous_if_any(expert_mask);
  Tensor grad_logits = torch::stable::new_empty(logits, {options.num_tokens, options.num_experts});
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    const auto* grad = gradient.const_data_ptr<acc_t>();
    const auto* ids = chosen.const_data_ptr<int32_t>();
    const bool* mask_of = mask ? mask->const_data_ptr<bool>() : nullptr;
    auto* grad_logit = grad_logits.mutable_data_ptr<scalar_t>();
    parallel_rows(options.num_tokens, options.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      Row<acc_t> row(options.num_experts);
      std::vector<acc_t> raw(options.topk), grad_raw(options.topk);
      for (int64_t token = begin; token < end; ++token) {
        read_row(row, logit, mask_of, options, token);
        score_row(row, options);
        backward_row(row, ids + token * options.topk, grad + token * options.topk, options, raw, grad_raw,
                     grad_logit + token * options.num_experts);
      }
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("topk_gating", TORCH_BOX(&moe_ext::cpu::topk_gating));
  m.impl("topk_gating_backward", TORCH_BOX(&moe_ext::cpu::topk_gating_backward));
}
