// Tokens are cut into chunks of fixed size; each sums its own scores, the chunks are added in order: the result does
// not depend on the number of threads.
#include "router_losses.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/optional_tensor.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kTokensPerChunk = 256;

template <typename acc_t>
struct TokenScores {
  std::vector<acc_t> logits, scores;  // scores sum to one
  acc_t logsumexp, total;             // total: the sum of the scores before they were divided by it
};

template <typename scalar_t, typename acc_t>
void score_token(TokenScores<acc_t>& token, const scalar_t* row, const LossShape& shape) {
  acc_t largest = -std::numeric_limits<acc_t>::infinity(), sum = 0;
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    token.logits[e] = static_cast<acc_t>(row[e]);
    largest = token.logits[e] > largest ? token.logits[e] : largest;
  }
  for (int64_t e = 0; e < shape.num_experts; ++e) sum += std::exp(token.logits[e] - largest);
  token.logsumexp = largest + std::log(sum);
  token.total = 1;
  if (shape.score_function == ScoreFunction::kSoftmax) {
    for (int64_t e = 0; e < shape.num_experts; ++e) token.scores[e] = std::exp(token.logits[e] - largest) / sum;
    return;
  }
  token.total = 0;
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    token.scores[e] = elementwise_score(shape.score_function, token.logits[e]);
    token.total += token.scores[e];
  }
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    token.scores[e] = token.total == acc_t(0) ? acc_t(0) : token.scores[e] / token.total;
  }
}

template <typename scalar_t, typename acc_t>
void backward_token(TokenScores<acc_t>& token, const std::vector<acc_t>& load, acc_t grad_balance, acc_t grad_z,
                    const LossShape& shape, scalar_t* grad_row) {
  acc_t mean = 0;
  for (int64_t e = 0; e < shape.num_experts; ++e) mean += load[e] * token.scores[e];
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    const acc_t probability = std::exp(token.logits[e] - token.logsumexp);
    acc_t slope = token.scores[e];
    if (shape.score_function != ScoreFunction::kSoftmax) {
      slope = token.total == acc_t(0) ? acc_t(0)
                                      : elementwise_score_gradient(shape.score_function, token.logits[e]) / token.total;
    }
    grad_row[e] = static_cast<scalar_t>(grad_balance * slope * (load[e] - mean) +
                                        grad_z * acc_t(2) * token.logsumexp * probability);
  }
}

constexpr int64_t kBytesPerScore = 64;  // exp and friends cost about this many bytes' worth of copying

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(const Tensor& logits, const Tensor& topk_ids,
                                                         const std::string& score_function,
                                                         const std::optional<Tensor>& token_mask) {
  const LossShape shape = check_router_losses(logits, topk_ids, score_function, token_mask);
  const Tensor source = torch::stable::contiguous(logits), ids = torch::stable::contiguous(topk_ids);
  const std::optional<Tensor> mask = contiguous_if_any(token_mask);
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const ScalarType dtype = router_dtype(logits.scalar_type());
  Tensor balance_loss = torch::stable::new_empty(logits, {}, dtype);
  Tensor z_loss = torch::stable::new_empty(logits, {}, dtype);
  Tensor tokens_per_expert = torch::stable::new_zeros(logits, {shape.num_experts}, ScalarType::Int);
  Tensor num_counted = torch::stable::new_empty(logits, {}, ScalarType::Int);

  auto* loads = tokens_per_expert.mutable_data_ptr<int32_t>();
  int32_t counted = 0;
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    const auto* id = ids.const_data_ptr<typename decltype(tag)::type>();
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      if (counts && !counts[token]) continue;
      ++counted;
      for (int64_t slot = token * shape.topk; slot < (token + 1) * shape.topk; ++slot) {
        if (id[slot] >= 0 && id[slot] < shape.num_experts) ++loads[id[slot]];
      }
    }
  });
  *num_counted.mutable_data_ptr<int32_t>() = counted;

  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    const int64_t num_chunks = (shape.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
    std::vector<acc_t> score_sums(num_chunks * shape.num_experts, acc_t(0)), square_sums(num_chunks, acc_t(0));
    parallel_rows(num_chunks, kTokensPerChunk * shape.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      TokenScores<acc_t> scored{std::vector<acc_t>(shape.num_experts), std::vector<acc_t>(shape.num_experts), 0, 0};
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        acc_t* sums = score_sums.data() + chunk * shape.num_experts;
        const int64_t last = std::min(shape.num_tokens, (chunk + 1) * kTokensPerChunk);
        for (int64_t token = chunk * kTokensPerChunk; token < last; ++token) {
          if (counts && !counts[token]) continue;
          score_token(scored, logit + token * shape.num_experts, shape);
          for (int64_t e = 0; e < shape.num_experts; ++e) sums[e] += scored.scores[e];
          square_sums[chunk] += scored.logsumexp * scored.logsumexp;
        }
      }
    });
    acc_t balance = 0, squares = 0;
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      acc_t sum = 0;
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum += score_sums[chunk * shape.num_experts + e];
      balance += static_cast<acc_t>(loads[e]) * sum;
    }
    for (acc_t square : square_sums) squares += square;
    const acc_t tokens = std::max(counted, 1);
    *balance_loss.mutable_data_ptr<acc_t>() =
        balance * static_cast<acc_t>(shape.num_experts) / (static_cast<acc_t>(shape.topk) * tokens * tokens);
    *z_loss.mutable_data_ptr<acc_t>() = squares / tokens;
  });
  return {balance_loss, z_loss, tokens_per_expert, num_counted};
}

Tensor router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss, const Tensor& logits,
                              const Tensor& tokens_per_expert, const Tensor& num_counted,
                              const std::string& score_function, const std::optional<Tensor>& token_mask,
                              int64_t topk) {
  const LossShape shape = check_router_losses_backward(grad_balance_loss, grad_z_loss, logits, tokens_per_expert,
                                                       num_counted, score_function, token_mask, topk);
  const Tensor source = torch::stable::contiguous(logits), loads = torch::stable::contiguous(tokens_per_expert);
  const std::optional<Tensor> mask = contiguous_if_any(token_mask);
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  Tensor grad_logits = torch::stable::new_empty(logits, {shape.num_tokens, shape.num_experts});
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    auto* grad = grad_logits.mutable_data_ptr<scalar_t>();
    const acc_t tokens = std::max(*num_counted.const_data_ptr<int32_t>(), 1);
    const acc_t grad_balance = *grad_balance_loss.const_data_ptr<acc_t>() / tokens;
    const acc_t grad_z = *grad_z_loss.const_data_ptr<acc_t>() / tokens;
    std::vector<acc_t> load(shape.num_experts);
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      load[e] = static_cast<acc_t>(loads.const_data_ptr<int32_t>()[e]) * static_cast<acc_t>(shape.num_experts) /
                (static_cast<acc_t>(shape.topk) * tokens);
    }
    parallel_rows(shape.num_tokens, shape.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      TokenScores<acc_t> scored{std::vector<acc_t>(shape.num_experts), std::vector<acc_t>(shape.num_experts), 0, 0};
      for (int64_t token = begin; token < end; ++token) {
        scalar_t* grad_row = grad + token * shape.num_experts;
        if (counts && !counts[token]) {
          std::fill_n(grad_row, shape.num_experts, scalar_t(0));
          continue;
        }
        score_token(scored, logit + token * shape.num_experts, shape);
        backward_token(scored, load, grad_balance, grad_z, shape, grad_row);
      }
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("router_losses", TORCH_BOX(&moe_ext::cpu::router_losses));
  m.impl("router_losses_backward", TORCH_BOX(&moe_ext::cpu::router_losses_backward));
}
