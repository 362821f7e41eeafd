#include "topk_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
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
  std::vector<int32_t> groups, picks;
  std::vector<acc_t> scores, weights, grads;  // of the slots
  SoftmaxRow<acc_t> softmax;

  explicit Row(const GateOptions& options)
      : logits(padded_row(options.num_experts)),
        allowed(padded_row(options.num_experts)),
        taking_part(logits.size()),
        values(logits.size()),
        keys(logits.size()),
        maxima(logits.size() / kRowLanes),
        groups(options.topk_groups),
        picks(options.num_picks()),
        scores(options.topk),
        weights(options.topk),
        grads(options.topk) {}
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

// The best experts in descending order of selection, NaN last, ties to the lower id, -1 where too few are allowed.
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
  take_largest(row.keys.data(), padded, row.maxima.data(), options.num_picks(), ids);
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

// What is renormalised: scores, or what stands for them.
template <typename acc_t>
void weigh_slots(const acc_t* scores, const int32_t* ids, const GateKnobs<acc_t>& knobs, const GateOptions& options,
                 int64_t token, acc_t* weights) {
  for (int64_t j = 0; j < options.topk; ++j) {
    const bool here = ids[j] >= 0 && ids[j] < options.num_experts;
    weights[j] = here ? knobs.weight(options, token, ids[j], scores[j]) : acc_t(0);
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

// Makes slots empty: those behind the first that reach top_p, those below min_ratio, all of a token that is not kept.
template <typename acc_t>
void drop_slots(Row<acc_t>& row, const GateKnobs<acc_t>& knobs, const GateOptions& options, int64_t token,
                int32_t forced, int32_t* ids) {
  if (options.drops_by_score()) {
    const acc_t top_p = static_cast<acc_t>(options.top_p), min_ratio = static_cast<acc_t>(options.min_ratio);
    raw_weights(row, ids, options, row.scores.data());
    acc_t before = 0;
    for (int64_t j = 0; j < options.topk; ++j) {
      const acc_t score = row.scores[j];
      const bool drop = before >= top_p || (j > 0 && score < min_ratio * row.scores[0]);
      before += score;
      if (drop && ids[j] != forced) ids[j] = -1;
    }
  }
  if (!knobs.keeps(token)) std::fill_n(ids, options.topk, -1);
}

// One token of a gate that is not plain. `mask` is the token's.
template <typename acc_t>
void gate_row(Row<acc_t>& row, const acc_t* bias, const bool* mask, const GateKnobs<acc_t>& knobs,
              const GateOptions& options, int64_t token, acc_t* weights, int32_t* ids) {
  select(row, bias, options, row.picks.data());
  std::copy_n(row.picks.begin() + options.first_rank, options.topk, ids);
  const int32_t forced = knobs.forced_id(token, options.num_experts, mask);
  if (forced >= 0 && std::find(ids, ids + options.topk, forced) == ids + options.topk) ids[options.topk - 1] = forced;
  drop_slots(row, knobs, options, token, forced, ids);
  raw_weights(row, ids, options, row.scores.data());
  weigh_slots(row.scores.data(), ids, knobs, options, token, weights);
  finish_weights(weights, options);
  for (int64_t j = 0; j < options.topk; ++j) {
    if (ids[j] >= 0) weights[j] *= knobs.gain(ids[j]);
  }
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

// The gradient of the logits from that of the scores of the slots, grad_scores.
template <typename scalar_t, typename acc_t>
void score_gradients(Row<acc_t>& row, const int32_t* ids, const acc_t* scores, const acc_t* grad_scores,
                     const GateOptions& options, int64_t next_id, acc_t grad_next, scalar_t* grad_logits) {
  const bool softmax = options.score_function == ScoreFunction::kSoftmax;
  acc_t dot = 0;
  for (int64_t j = 0; softmax && j < options.topk; ++j) dot += grad_scores[j] * scores[j];
  const bool spreads = over_whole_row(options) && dot != acc_t(0);
  if (spreads) {
    softmax_scores(row.taking_part.data(), row.softmax, options.num_experts, row.values.data());
    spread_gradient(row.logits.data(), row.allowed.data(), row.values.data(), -dot, options.num_experts, grad_logits);
  } else {
    std::fill_n(grad_logits, options.num_experts, scalar_t(0));
  }
  if (next_id >= 0) {  // rounded once, together with what the softmax gives it
    const bool takes_part = spreads && row.allowed[next_id] && row.logits[next_id] == row.logits[next_id];
    grad_logits[next_id] = static_cast<scalar_t>(grad_next - (takes_part ? dot * row.values[next_id] : acc_t(0)));
  }
  for (int64_t j = 0; j < options.topk; ++j) {
    const int64_t e = ids[j];
    if (e < 0 || e >= options.num_experts) continue;
    const acc_t gradient = softmax ? scores[j] * (grad_scores[j] - dot)
                                   : grad_scores[j] * elementwise_score_gradient(options.score_function, row.logits[e]);
    grad_logits[e] = static_cast<scalar_t>(e == next_id ? gradient + grad_next : gradient);
  }
}

template <typename scalar_t, typename acc_t>
void plain_backward_row(Row<acc_t>& row, const int32_t* ids, const acc_t* grad, const GateOptions& options,
                        scalar_t* grad_logits) {
  raw_weights(row, ids, options, row.scores.data());
  weight_gradients(row.scores.data(), grad, options, row.grads.data());
  score_gradients(row, ids, row.scores.data(), row.grads.data(), options, -1, acc_t(0), grad_logits);
}

// grad_external: the token's row, null where weights are not external.
template <typename scalar_t, typename acc_t>
void backward_row(Row<acc_t>& row, const int32_t* ids, const acc_t* grad, const GateKnobs<acc_t>& knobs,
                  const GateOptions& options, int64_t token, scalar_t* grad_logits, acc_t* grad_external) {
  const auto here = [&](int64_t j) { return ids[j] >= 0 && ids[j] < options.num_experts; };
  raw_weights(row, ids, options, row.scores.data());
  weigh_slots(row.scores.data(), ids, knobs, options, token, row.weights.data());
  for (int64_t j = 0; j < options.topk; ++j) row.grads[j] = here(j) ? grad[j] * knobs.gain(ids[j]) : acc_t(0);
  weight_gradients(row.weights.data(), row.grads.data(), options, row.grads.data());
  if (grad_external) std::fill_n(grad_external, options.num_experts, acc_t(0));
  for (int64_t j = 0; j < options.topk; ++j) {
    if (!here(j) || !knobs.weighs(ids[j])) row.grads[j] = 0;
    if (grad_external && here(j)) grad_external[ids[j]] = row.grads[j];
    if (options.weight_source != WeightSource::kScores) row.scores[j] = row.grads[j] = 0;
  }
  const int64_t next_id = knobs.next_id ? knobs.next_id[token] : -1;
  score_gradients(row, ids, row.scores.data(), row.grads.data(), options, next_id < options.num_experts ? next_id : -1,
                  next_id >= 0 ? knobs.grad_next_logit[token] : acc_t(0), grad_logits);
}

}  // namespace

GateResult topk_gating(const Tensor& logits, const GateTensors& tensors, const GateOptions& options) {
  const ScalarType weight_dtype = router_dtype(logits.scalar_type());
  const int64_t num_next = options.has_next_logit ? options.num_tokens : 0;
  Tensor topk_weights = make_tensor(logits, {options.num_tokens, options.topk}, weight_dtype);
  Tensor topk_ids = make_tensor(logits, {options.num_tokens, options.topk}, ScalarType::Int);
  Tensor next_logit = make_tensor(logits, {num_next}, weight_dtype);
  Tensor next_id = make_tensor(logits, {num_next}, ScalarType::Int);
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = logits.const_data_ptr<scalar_t>();
    const acc_t* bias = pointer_if_any<acc_t>(tensors.selection_bias);
    const bool* mask = pointer_if_any<bool>(tensors.expert_mask);
    const GateKnobs<acc_t> knobs(tensors);
    const bool plain = is_plain(tensors, options);
    auto* weights = topk_weights.mutable_data_ptr<acc_t>();
    auto* ids = topk_ids.mutable_data_ptr<int32_t>();
    auto* next_logits = next_logit.mutable_data_ptr<acc_t>();
    auto* next_ids = next_id.mutable_data_ptr<int32_t>();
    parallel_rows(options.num_tokens, options.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      Row<acc_t> row(options);
      for (int64_t token = begin; token < end; ++token) {
        acc_t* weights_here = weights + token * options.topk;
        int32_t* ids_here = ids + token * options.topk;
        read_row(row, logit, mask, options, token);
        if (plain) {
          select(row, bias, options, ids_here);
          raw_weights(row, ids_here, options, weights_here);
          finish_weights(weights_here, options);
          continue;
        }
        gate_row(row, bias, mask ? mask + token * options.mask_stride : nullptr, knobs, options, token, weights_here,
                 ids_here);
        if (!options.has_next_logit) continue;
        next_ids[token] = row.picks.back();
        next_logits[token] =
            row.picks.back() < 0 ? -std::numeric_limits<acc_t>::infinity() : row.logits[row.picks.back()];
      }
    });
  });
  return {topk_weights, topk_ids, next_logit, next_id};
}

GateGradients topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                                   const GateTensors& tensors, const GateOptions& options) {
  const bool external = options.weight_source == WeightSource::kExternal;
  Tensor grad_logits = make_tensor(logits, {options.num_tokens, options.num_experts});
  Tensor grad_external_weights =
      make_tensor(logits, {external ? options.num_tokens : 0, options.num_experts}, router_dtype(logits.scalar_type()));
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = logits.const_data_ptr<scalar_t>();
    const auto* grad = grad_topk_weights.const_data_ptr<acc_t>();
    const auto* ids = topk_ids.const_data_ptr<int32_t>();
    const bool* mask = pointer_if_any<bool>(tensors.expert_mask);
    const GateKnobs<acc_t> knobs(tensors);
    const bool plain = is_plain(tensors, options);
    auto* grad_logit = grad_logits.mutable_data_ptr<scalar_t>();
    auto* grad_external = grad_external_weights.mutable_data_ptr<acc_t>();
    parallel_rows(options.num_tokens, options.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      Row<acc_t> row(options);
      for (int64_t token = begin; token < end; ++token) {
        const int32_t* ids_here = ids + token * options.topk;
        const acc_t* grad_here = grad + token * options.topk;
        scalar_t* grad_row = grad_logit + token * options.num_experts;
        read_row(row, logit, mask, options, token);
        if (plain) {
          plain_backward_row(row, ids_here, grad_here, options, grad_row);
        } else {
          backward_row(row, ids_here, grad_here, knobs, options, token, grad_row,
                       external ? grad_external + token * options.num_experts : nullptr);
        }
      }
    });
  });
  return {grad_logits, grad_external_weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  using Forward = moe_ext::GateOp<&moe_ext::cpu::topk_gating>;
  using Backward = moe_ext::GateBackwardOp<&moe_ext::cpu::topk_gating_backward>;
  m.impl("topk_gating", TORCH_BOX(&Forward::plain));
  m.impl("topk_gating_backward", TORCH_BOX(&Backward::plain));
  m.impl("topk_gating_general", TORCH_BOX(&Forward::general));
  m.impl("topk_gating_general_backward", TORCH_BOX(&Backward::general));
}
