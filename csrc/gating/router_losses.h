// router_losses: the load-balancing loss and the z-loss of a gate, in one pass over the logits, and their gradient.
//   balance_loss = sum_e eta_e f_e P_e, f_e = the load of expert e, P_e = mean over counted tokens of the token's
//   scores
//                  divided by their sum; with several sequences the mean of this over those with a counted token
//   z_loss       = mean over counted tokens of logsumexp(logits)^2
// T' = the tokens of a sequence whose mask is true, num_counted. Losses are 0 where nothing counts.
#pragma once

#include <tuple>

#include "scores.h"

namespace moe_ext {

// f_e from n_e, the slots of counted tokens that hold expert e: E / (K T') n_e, n_e / T', n_e.
enum class Load { kRelative, kFraction, kCount };

inline Load parse_load(const std::string& name) {
  if (name == "relative") return Load::kRelative;
  if (name == "fraction") return Load::kFraction;
  if (name == "count") return Load::kCount;
  MOE_CHECK(false, "load: expected relative, fraction or count, got ", name);
}

struct LossShape {
  int64_t num_tokens, num_experts, topk;
  ScoreFunction score_function;
  Load load;
  int64_t num_sequences;

  MOE_HOST_DEVICE int64_t sequence_length() const { return num_tokens / num_sequences; }
  // f_e / n_e of a sequence with so many counted tokens.
  template <typename acc_t>
  MOE_HOST_DEVICE acc_t load_factor(int32_t num_counted) const {
    if (load == Load::kCount) return acc_t(1);
    const acc_t tokens = static_cast<acc_t>(num_counted > 1 ? num_counted : 1);
    if (load == Load::kFraction) return acc_t(1) / tokens;
    return static_cast<acc_t>(num_experts) / (static_cast<acc_t>(topk) * tokens);
  }
};

inline void check_token_mask(const std::optional<Tensor>& token_mask, const Tensor& logits) {
  if (!token_mask.has_value()) return;
  check_tensor(*token_mask, "token_mask", {ScalarType::Bool}, 1, "[num_tokens]");
  check_size(*token_mask, "token_mask", 0, logits.size(0), "num_tokens, as in logits");
  check_same_device(*token_mask, "token_mask", logits, "logits");
}

inline void check_expert_weights(const std::optional<Tensor>& expert_weights, const Tensor& logits) {
  if (!expert_weights.has_value()) return;
  check_tensor(*expert_weights, "expert_weights", {router_dtype(logits.scalar_type())}, 1, "[num_experts]");
  check_size(*expert_weights, "expert_weights", 0, logits.size(1), "num_experts, as in logits");
  check_same_device(*expert_weights, "expert_weights", logits, "logits");
}

inline LossShape check_router_losses(const Tensor& logits, const Tensor& topk_ids, const std::string& score_function,
                                     const std::optional<Tensor>& token_mask,
                                     const std::optional<Tensor>& expert_weights, const std::string& load,
                                     int64_t num_sequences) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  MOE_CHECK(logits.size(1) >= 1, "logits: expected at least one expert, got ", describe(logits));
  check_fits_int32(logits.size(0), "num_tokens");
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int, ScalarType::Long}, 2, "[num_tokens, topk]");
  check_size(topk_ids, "topk_ids", 0, logits.size(0), "num_tokens, as in logits");
  check_at_least(topk_ids.size(1), "topk, the columns of topk_ids", 1);
  check_fits_int32(topk_ids.numel(), "topk_ids, number of slots");
  check_same_device(topk_ids, "topk_ids", logits, "logits");
  check_token_mask(token_mask, logits);
  check_expert_weights(expert_weights, logits);
  check_at_least(num_sequences, "num_sequences", 1);
  MOE_CHECK(logits.size(0) % num_sequences == 0, "num_sequences: expected a divisor of num_tokens = ", logits.size(0),
            ", got ", num_sequences);
  return {logits.size(0),   logits.size(1), topk_ids.size(1), parse_score_function(score_function),
          parse_load(load), num_sequences};
}

inline LossShape check_router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss,
                                              const Tensor& logits, const Tensor& tokens_per_expert,
                                              const Tensor& num_counted, const std::string& score_function,
                                              const std::optional<Tensor>& token_mask,
                                              const std::optional<Tensor>& expert_weights, const std::string& load,
                                              int64_t topk) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  check_tensor(grad_balance_loss, "grad_balance_loss", {router_dtype(logits.scalar_type())}, 0, "[]");
  check_tensor(grad_z_loss, "grad_z_loss", {router_dtype(logits.scalar_type())}, 0, "[]");
  check_tensor(tokens_per_expert, "tokens_per_expert", {ScalarType::Int}, 2, "[num_sequences, num_experts]");
  check_size(tokens_per_expert, "tokens_per_expert", 1, logits.size(1), "num_experts, as in logits");
  const int64_t num_sequences = tokens_per_expert.size(0);
  MOE_CHECK(num_sequences >= 1 && logits.size(0) % num_sequences == 0,
            "tokens_per_expert: expected a divisor of num_tokens = ", logits.size(0), " as num_sequences, got ",
            describe(tokens_per_expert));
  check_tensor(num_counted, "num_counted", {ScalarType::Int}, 1, "[num_sequences]");
  check_size(num_counted, "num_counted", 0, num_sequences, "num_sequences, as in tokens_per_expert");
  check_same_device(grad_balance_loss, "grad_balance_loss", logits, "logits");
  check_same_device(grad_z_loss, "grad_z_loss", logits, "logits");
  check_same_device(tokens_per_expert, "tokens_per_expert", logits, "logits");
  check_same_device(num_counted, "num_counted", logits, "logits");
  check_token_mask(token_mask, logits);
  check_expert_weights(expert_weights, logits);
  check_at_least(topk, "topk", 1);
  return {logits.size(0), logits.size(1), topk, parse_score_function(score_function), parse_load(load), num_sequences};
}

#define MOE_DECLARE_ROUTER_LOSSES                                                                                    \
  std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(                                                          \
      const Tensor& logits, const Tensor& topk_ids, const std::string& score_function,                               \
      const std::optional<Tensor>& token_mask, const std::optional<Tensor>& expert_weights, const std::string& load, \
      int64_t num_sequences);                                                                                        \
  Tensor router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss, const Tensor& logits,    \
                                const Tensor& tokens_per_expert, const Tensor& num_counted,                          \
                                const std::string& score_function, const std::optional<Tensor>& token_mask,          \
                                const std::optional<Tensor>& expert_weights, const std::string& load, int64_t topk);
namespace cpu {
MOE_DECLARE_ROUTER_LOSSES
}
namespace cuda {
MOE_DECLARE_ROUTER_LOSSES
}
#undef MOE_DECLARE_ROUTER_LOSSES

}  // namespace moe_ext
