// topk_gating: logits [T, E] -> topk_weights [T, K] and topk_ids [T, K]; topk_gating_backward: back to the logits.
#pragma once

#include <tuple>

#include "scores.h"

namespace moe_ext {

struct GateOptions {
  int64_t num_tokens, num_experts, topk;
  ScoreFunction score_function;
  bool select_then_score;
  int64_t num_groups, topk_groups;
  bool renormalize;
  double renormalize_eps, scale;
  // 0: no mask, else the distance between the masks of two tokens: 0 experts (one mask for all) or num_experts.
  bool has_mask;
  int64_t mask_stride;
};

inline bool parse_score_order(const std::string& name) {
  MOE_CHECK(name == "score_then_select" || name == "select_then_score",
            "score_order: expected score_then_select or select_then_score, got ", name);
  return name == "select_then_score";
}

inline void check_mask(const std::optional<Tensor>& expert_mask, const Tensor& logits, GateOptions& options) {
  options.has_mask = expert_mask.has_value();
  options.mask_stride = 0;
  if (!options.has_mask) return;
  const bool per_token = expert_mask->dim() == 2;
  check_tensor(*expert_mask, "expert_mask", {ScalarType::Bool}, per_token ? 2 : 1,
               "[num_experts] or [num_tokens, num_experts]");
  if (per_token) check_size(*expert_mask, "expert_mask", 0, logits.size(0), "num_tokens, as in logits");
  check_size(*expert_mask, "expert_mask", per_token ? 1 : 0, logits.size(1), "num_experts, as in logits");
  check_same_device(*expert_mask, "expert_mask", logits, "logits");
  if (per_token) options.mask_stride = logits.size(1);
}

inline GateOptions check_topk_gating(const Tensor& logits, int64_t topk, const std::string& score_function,
                                     const std::string& score_order, const std::optional<Tensor>& selection_bias,
                                     const std::optional<Tensor>& expert_mask, int64_t num_groups, int64_t topk_groups,
                                     bool renormalize, double renormalize_eps, double scale) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  MOE_CHECK(logits.size(1) >= 1, "logits: expected at least one expert, got ", describe(logits));
  check_at_least(topk, "topk", 1);
  const int64_t num_experts = logits.size(1);
  check_fits_int32(num_experts, "num_experts");
  MOE_CHECK(topk <= num_experts, "topk: expected at most num_experts = ", num_experts, ", got ", topk);
  GateOptions options{};
  options.num_tokens = logits.size(0);
  options.num_experts = num_experts;
  options.topk = topk;
  options.score_function = parse_score_function(score_function);
  options.select_then_score = parse_score_order(score_order);
  check_at_least(num_groups, "num_groups", 1);
  MOE_CHECK(num_experts % num_groups == 0, "num_groups: expected a divisor of num_experts = ", num_experts, ", got ",
            num_groups);
  MOE_CHECK(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups: expected 1 to num_groups = ", num_groups,
            ", got ", topk_groups);
  MOE_CHECK(topk <= topk_groups * (num_experts / num_groups), "topk: expected at most ",
            topk_groups * (num_experts / num_groups), ", the experts of topk_groups groups, got ", topk);
  options.num_groups = num_groups;
  options.topk_groups = topk_groups;
  options.renormalize = renormalize;
  MOE_CHECK(renormalize_eps >= 0, "renormalize_eps: expected a number >= 0, got ", renormalize_eps);
  options.renormalize_eps = renormalize_eps;
  options.scale = scale;
  if (selection_bias.has_value()) {
    check_tensor(*selection_bias, "selection_bias", {router_dtype(logits.scalar_type())}, 1, "[num_experts]");
    check_size(*selection_bias, "selection_bias", 0, num_experts, "num_experts, as in logits");
    check_same_device(*selection_bias, "selection_bias", logits, "logits");
  }
  check_mask(expert_mask, logits, options);
  return options;
}

inline GateOptions check_topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits,
                                              const Tensor& topk_ids, const std::string& score_function,
                                              const std::string& score_order, const std::optional<Tensor>& expert_mask,
                                              bool renormalize, double renormalize_eps, double scale) {
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int}, 2, "[num_tokens, topk]");
  const GateOptions options = check_topk_gating(logits, topk_ids.size(1), score_function, score_order, std::nullopt,
                                                expert_mask, 1, 1, renormalize, renormalize_eps, scale);
  check_size(topk_ids, "topk_ids", 0, options.num_tokens, "num_tokens, as in logits");
  check_tensor(grad_topk_weights, "grad_topk_weights", {router_dtype(logits.scalar_type())}, 2, "[num_tokens, topk]");
  check_size(grad_topk_weights, "grad_topk_weights", 0, options.num_tokens, "num_tokens, as in logits");
  check_size(grad_topk_weights, "grad_topk_weights", 1, options.topk, "topk, as in topk_ids");
  check_same_device(topk_ids, "topk_ids", logits, "logits");
  check_same_device(grad_topk_weights, "grad_topk_weights", logits, "logits");
  return options;
}

#define MOE_DECLARE_TOPK_GATING                                                                                        \
  std::tuple<Tensor, Tensor> topk_gating(const Tensor& logits, int64_t topk, const std::string& score_function,        \
                                         const std::string& score_order, const std::optional<Tensor>& selection_bias,  \
                                         const std::optional<Tensor>& expert_mask, int64_t num_groups,                 \
                                         int64_t topk_groups, bool renormalize, double renormalize_eps, double scale); \
  Tensor topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,           \
                              const std::string& score_function, const std::string& score_order,                       \
                              const std::optional<Tensor>& expert_mask, bool renormalize, double renormalize_eps,      \
                              double scale);
namespace cpu {
MOE_DECLARE_TOPK_GATING
}
namespace cuda {
MOE_DECLARE_TOPK_GATING
}
#undef MOE_DECLARE_TOPK_GATING

}  // namespace moe_ext
