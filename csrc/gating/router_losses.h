// router_losses: the load-balancing loss and the z-loss of a gate, in one pass over the logits, and their gradient.
//   balance_loss = sum_e f_e P_e, f_e = E / (K T') * tokens_per_expert[e], P_e = mean over counted tokens of the
//   token's
//                  scores divided by their sum;  z_loss = mean over counted tokens of logsumexp(logits)^2
// T' = num_counted, the tokens whose mask is true. Both losses are 0 where T' = 0.
#pragma once

#include <tuple>

#include "scores.h"

namespace moe_ext {

struct LossShape {
  int64_t num_tokens, num_experts, topk;
  ScoreFunction score_function;
};

inline void check_token_mask(const std::optional<Tensor>& token_mask, const Tensor& logits) {
  if (!token_mask.has_value()) return;
  check_tensor(*token_mask, "token_mask", {ScalarType::Bool}, 1, "[num_tokens]");
  check_size(*token_mask, "token_mask", 0, logits.size(0), "num_tokens, as in logits");
  check_same_device(*token_mask, "token_mask", logits, "logits");
}

inline LossShape check_router_losses(const Tensor& logits, const Tensor& topk_ids, const std::string& score_function,
                                     const std::optional<Tensor>& token_mask) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  MOE_CHECK(logits.size(1) >= 1, "logits: expected at least one expert, got ", describe(logits));
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int, ScalarType::Long}, 2, "[num_tokens, topk]");
  check_size(topk_ids, "topk_ids", 0, logits.size(0), "num_tokens, as in logits");
  check_at_least(topk_ids.size(1), "topk, the columns of topk_ids", 1);
  check_same_device(topk_ids, "topk_ids", logits, "logits");
  check_token_mask(token_mask, logits);
  return {logits.size(0), logits.size(1), topk_ids.size(1), parse_score_function(score_function)};
}

inline LossShape check_router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss,
                                              const Tensor& logits, const Tensor& tokens_per_expert,
                                              const Tensor& num_counted, const std::string& score_function,
                                              const std::optional<Tensor>& token_mask, int64_t topk) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  check_tensor(grad_balance_loss, "grad_balance_loss", {router_dtype(logits.scalar_type())}, 0, "[]");
  check_tensor(grad_z_loss, "grad_z_loss", {router_dtype(logits.scalar_type())}, 0, "[]");
  check_tensor(tokens_per_expert, "tokens_per_expert", {ScalarType::Int}, 1, "[num_experts]");
  check_size(tokens_per_expert, "tokens_per_expert", 0, logits.size(1), "num_experts, as in logits");
  check_tensor(num_counted, "num_counted", {ScalarType::Int}, 0, "[]");
  check_same_device(grad_balance_loss, "grad_balance_loss", logits, "logits");
  check_same_device(grad_z_loss, "grad_z_loss", logits, "logits");
  check_same_device(tokens_per_expert, "tokens_per_expert", logits, "logits");
  check_same_device(num_counted, "num_counted", logits, "logits");
  check_token_mask(token_mask, logits);
  check_at_least(topk, "topk", 1);
  return {logits.size(0), logits.size(1), topk, parse_score_function(score_function)};
}

#define MOE_DECLARE_ROUTER_LOSSES                                                                                 \
  std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(const Tensor& logits, const Tensor& topk_ids,          \
                                                           const std::string& score_function,                     \
                                                           const std::optional<Tensor>& token_mask);              \
  Tensor router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss, const Tensor& logits, \
                                const Tensor& tokens_per_expert, const Tensor& num_counted,                       \
                                const std::string& score_function, const std::optional<Tensor>& token_mask,       \
                                int64_t topk);
namespace cpu {
MOE_DECLARE_ROUTER_LOSSES
}
namespace cuda {
MOE_DECLARE_ROUTER_LOSSES
}
#undef MOE_DECLARE_ROUTER_LOSSES

}  // namespace moe_ext
