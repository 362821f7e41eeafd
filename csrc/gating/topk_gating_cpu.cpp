#include "topk_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/optional_tensor.h"
#include "row_cpu.h"

namespace moe_ext::cpu {
namespace {

// One token's row in the accumulation type, and what is derived from it. Arrays are padded to whole lanes.
template <typename acc_t>
struct Row {
  using key_t = ordered_key_t<acc_t>;
  std::vector<acc_t> logits;
  std::vector<uint8_t> allowed;
  std::vector<acc_t> taking_part;  // the logits of the softmax: -inf for what is not allowed or NaN
  std::vector<acc_t> values;       // what the selection compares, before it becomes a key
  std::vector<key_t> keys, maxima;
  std::vector<int32_t> groups;
  SoftmaxRow<acc_t> softmax;

  explicit Row(const GateOptions& options)
      : logits(padded_row(options.num_experts)),
        allowed(padded_row(options.num_experts)),
        taking_part(logits.size()),
        values(logits.size()),
        keys(logits.size()),
        maxima(logits.size() / kRowLanes),
        groups(options.topk_groups) {}
};

template <typename acc_t>
MOE_CPU_CLONES void leave_out(const acc_t* logits, const uint8_t* allowed, int64_t padded, acc_t* taking_part) {
  for (int64_t e = 0; e < padded; ++e) {
    taking_part[e] = allowed[e] && logits[e] == logits[e] ? logits[e] : -std::numeric_limits<acc_t>::infinity();
  }
}

bool over_whole_row(const GateOptions& options) {
  return options.score_function == ScoreFunction::kSoftmax && !options.select_then_score;
}

template <typename scalar_t, typename acc_t>
void read_row(Row<acc_t>& row, const scalar_t* logits, const bool* mask, const GateOptions& options, int64_t token) {
  const int64_t num_experts = options.num_experts;
  read_logits(logits + token * num_experts, num_experts, row.logits.data());
  if (mask) {
    std::copy_n(mask + token * options.mask_stride, num_experts, row.allowed.begin());
  } else {
    std::fill_n(row.allowed.begin(), num_experts, uint8_t{1});
  }
  if (!over_whole_row(options)) return;
  leave_out(row.logits.data(), row.allowed.data(), static_cast<int64_t>(row.logits.size()), row.taking_part.data());
  row.softmax = softmax_of_row(row.taking_part.data(), static_cast<int64_t>(row.taking_part.size()));
}

// What the selection compares: the biased score, or with select_then_score the biased logit.
template <typename acc_t>
void selection_values(Row<acc_t>& row, const acc_t* bias, const GateOptions& options) {
  const int64_t num_experts = options.num_experts;
  if (options.select_then_score) {
    std::copy_n(row.logits.begin(), num_experts, row.values.begin());
  } else if (options.score_function == ScoreFunction::kSoftmax) {
    softmax_scores(row.logits.data(), row.softmax, num_experts, row.values.data());
  } else {
    elementwise_scores(options.score_function, row.logits.data(), num_experts, row.values.data());
  }
  for (int64_t e = 0; bias && e < num_experts; ++e) row.values[e] += bias[e];
}

template <typename acc_t>
MOE_CPU_CLONES void make_keys(const acc_t* values, const uint8_t* allowed, int64_t size, ordered_key_t<acc_t>* keys) {
  using key_t = ordered_key_t<acc_t>;
  for (int64_t e = 0; e < size; ++e) {
    // + 0 makes one zero of the two; NaN is 1, below every number.
    const key_t key = std::max<key_t>(ordered_key(values[e] + acc_t(0)), 1);
    keys[e] = allowed[e] ? key : 0;
  }
}

// The sum of the two largest values of a group (DeepSeek-V3); the largest alone where there is no second.
template <typename acc_t>
acc_t group_score(const acc_t* values, const uint8_t* allowed, int64_t group_size) {
  const acc_t lowest = -std::numeric_limits<acc_t>::infinity();
  acc_t best = lowest, second = lowest;
  for (int64_t i = 0; i < group_size; ++i) {
    const acc_t value = allowed[i] && values[i] == values[i] ? values[i] : lowest;
    second = std::max(second, std::min(best, value));
    best = std::max(best, value);
  }
  return second == lowest ? best : best + second;
}

// Keeps the experts of the best groups, ties to the lower group.
template <typename acc_t>
void limit_to_groups(Row<acc_t>& row, const GateOptions& options) {
  const int64_t group_size = options.num_experts / options.num_groups, padded = padded_row(options.num_groups);
  std::fill_n(row.keys.begin(), padded, 0);
  for (int64_t g = 0; g < options.num_groups; ++g) {
    row.keys[g] = ordered_key(
        group_score(row.values.data() + g * group_size, row.allowed.data() + g * group_size, group_size) + acc_t(0));
  }
  take_largest(row.keys.data(), padded, row.maxima.data(), options.topk_groups, row.groups.data());
  std::sort(row.groups.begin(), row.groups.end());
  auto kept = row.groups.begin();
  for (int64_t g = 0; g < options.num_groups; ++g) {
    if (kept != row.groups.end() && *kept == g) {
      ++kept;
    } else {
      std::fill_n(row.allowed.begin() + g * group_size, group_size, uint8_t{0});
    }
  }
}

// The topk experts in descending order of selection, NaN last, ties to the lower id, -1 where too few are allowed.
template <typename acc_t>
void select(Row<acc_t>& row, const acc_t* bias, const GateOptions& options, int32_t* ids) {
  const bool grouped = options.topk_groups < options.num_groups;
  if (bias || grouped) selection_values(row, bias, options);
  if (grouped) limit_to_groups(row, options);
  // Without a bias the order of the scores is the order of the logits, where rounding makes no ties.
  const auto& compared = bias ? row.values : row.logits;
  const int64_t padded = static_cast<int64_t>(row.keys.size());
  std::fill(row.keys.begin() + options.num_experts, row.keys.end(), 0);
  make_keys(compared.data(), row.allowed.data(), options.num_experts, row.keys.data());
  take_largest(row.keys.data(), padded, row.maxima.data(), options.topk, ids);
}

// The softmax over the chosen experts; a NaN logit takes no part in it.
template <typename acc_t>
SoftmaxRow<acc_t> softmax_over_chosen(const Row<acc_t>& row, const int32_t* ids, const GateOptions& options) {
  SoftmaxRow<acc_t> softmax{-std::numeric_limits<acc_t>::infinity(), acc_t(0)};
  const auto takes_part = [&](int32_t e) { return e >= 0 && e < options.num_experts && !std::isnan(row.logits[e]); };
  for (int64_t j = 0; j < options.topk; ++j) {
    if (takes_part(ids[j])) softmax.largest = std::max(softmax.largest, row.logits[ids[j]]);
  }
  for (int64_t j = 0; j < options.topk; ++j) {
    if (takes_part(ids[j])) softmax.sum += std::exp(row.logits[ids[j]] - softmax.largest);
  }
  return softmax;
}

// Unscaled, not renormalised weights of the chosen slots; 0 for slots without an expert.
template <typename acc_t>
void raw_weights(const Row<acc_t>& row, const int32_t* ids, const GateOptions& options, acc_t* weights) {
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  const SoftmaxRow<acc_t> softmax =
      is_softmax && options.select_then_score ? softmax_over_chosen(row, ids, options) : row.softmax;
  for (int64_t j = 0; j < options.topk; ++j) {
    const bool here = ids[j] >= 0 && ids[j] < options.num_experts;
    weights[j] = !here        ? acc_t(0)
                 : is_softmax ? softmax.probability(row.logits[ids[j]])
                              : elementwise_score(options.score_function, row.logits[ids[j]]);
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
MOE_CPU_CLONES void spread_gradient(const acc_t* logits, const uint8_t* allowed, const acc_t* scores, acc_t factor,
                                    int64_t num_experts, scalar_t* grad_logits) {
  for (int64_t e = 0; e < num_experts; ++e) {
    const acc_t gradient = factor * scores[e];
    grad_logits[e] = static_cast<scalar_t>(allowed[e] && logits[e] == logits[e] ? gradient : acc_t(0));
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
  if (over_whole_row(options) && dot != acc_t(0)) {
    softmax_scores(row.taking_part.data(), row.softmax, options.num_experts, row.values.data());
    spread_gradient(row.logits.data(), row.allowed.data(), row.values.data(), -dot, options.num_experts, grad_logits);
  } else {
    std::fill_n(grad_logits, options.num_experts, scalar_t(0));
  }
  for (int64_t j = 0; j < options.topk; ++j) {
    const int64_t e = ids[j];
    if (e < 0 || e >= options.num_experts) continue;
    grad_logits[e] = static_cast<scalar_t>(
        softmax ? raw[j] * (grad_raw[j] - dot)
                : grad_raw[j] * elementwise_score_gradient(options.score_function, row.logits[e]));
  }
}

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
      Row<acc_t> row(options);
      for (int64_t token = begin; token < end; ++token) {
        read_row(row, logit, mask_of, options, token);
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
      Row<acc_t> row(options);
      std::vector<acc_t> raw(options.topk), grad_raw(options.topk);
      for (int64_t token = begin; token < end; ++token) {
        read_row(row, logit, mask_of, options, token);
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
