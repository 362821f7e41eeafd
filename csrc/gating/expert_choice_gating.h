// expert_choice_gating: every expert picks its `capacity` best tokens (Zhou et al. 2022). Dense results, so that they
// drop into a routing plan with topk = num_experts: column e of topk_ids holds e where expert e chose the token, else
// -1.
#pragma once

#include <tuple>

#include "scores.h"

namespace moe_ext {

struct ExpertChoiceShape {
  int64_t num_tokens, num_experts, capacity;  // capacity at most num_tokens
  ScoreFunction score_function;
};

inline ExpertChoiceShape check_expert_choice_gating(const Tensor& logits, int64_t capacity,
                                                    const std::string& score_function) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  MOE_CHECK(logits.size(1) >= 1, "logits: expected at least one expert, got ", describe(logits));
  check_at_least(capacity, "capacity", 0);
  check_fits_int32(logits.size(0), "num_tokens");
  return {logits.size(0), logits.size(1), std::min(capacity, logits.size(0)), parse_score_function(score_function)};
}

inline ExpertChoiceShape check_expert_choice_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits,
                                                             const Tensor& topk_ids,
                                                             const std::string& score_function) {
  const ExpertChoiceShape shape = check_expert_choice_gating(logits, 0, score_function);
  check_tensor(grad_topk_weights, "grad_topk_weights", {router_dtype(logits.scalar_type())}, 2,
               "[num_tokens, num_experts]");
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int}, 2, "[num_tokens, num_experts]");
  for (int64_t axis = 0; axis < 2; ++axis) {
    const char* meaning = axis == 0 ? "num_tokens, as in logits" : "num_experts, as in logits";
    check_size(grad_topk_weights, "grad_topk_weights", axis, logits.size(axis), meaning);
    check_size(topk_ids, "topk_ids", axis, logits.size(axis), meaning);
  }
  check_same_device(grad_topk_weights, "grad_topk_weights", logits, "logits");
  check_same_device(topk_ids, "topk_ids", logits, "logits");
  return shape;
}

#define MOE_DECLARE_EXPERT_CHOICE_GATING                                                                              \
  std::tuple<Tensor, Tensor> expert_choice_gating(const Tensor& logits, int64_t capacity,                             \
                                                  const std::string& score_function);                                 \
  Tensor expert_choice_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids, \
                                       const std::string& score_function);
namespace cpu {
MOE_DECLARE_EXPERT_CHOICE_GATING
}
namespace cuda {
MOE_DECLARE_EXPERT_CHOICE_GATING
}
#undef MOE_DECLARE_EXPERT_CHOICE_GATING

}  // namespace moe_ext
