// Sequences are cut into chunks of fixed size; each sums its own scores, the chunks are added in order: the result does
// not depend on the number of threads.
#include "router_losses.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/tensors.h"
#include "row_cpu.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kTokensPerChunk = 256;

// One token's row, padded to whole lanes: logits with -inf, the rest with 0.
template <typename acc_t>
struct TokenRow {
  std::vector<acc_t> logits, probabilities;  // the softmax
  std::vector<acc_t> raw, scores;            // of other score functions, before and after they are made to sum to one
  acc_t logsumexp = 0, total = 1;            // total: the sum of the raw scores
  int64_t padded;

  explicit TokenRow(int64_t num_experts) : padded(padded_row(num_experts)) {
    logits.assign(padded, -std::numeric_limits<acc_t>::infinity());
    probabilities.assign(padded, acc_t(0));
    raw = scores = probabilities;
  }
};

template <typename acc_t>
MOE_CPU_CLONES acc_t normalize(const acc_t* raw, int64_t padded, acc_t* scores) {
  const acc_t total = sum_of_row(raw, padded);
  for (int64_t e = 0; e < padded; ++e) scores[e] = total == acc_t(0) ? acc_t(0) : raw[e] / total;
  return total;
}

// Returns the scores, which sum to one.
template <typename scalar_t, typename acc_t>
const acc_t* score_token(TokenRow<acc_t>& row, const scalar_t* source, const LossShape& shape) {
  read_logits(source, shape.num_experts, row.logits.data());
  const SoftmaxRow<acc_t> softmax = softmax_into(row.logits.data(), row.padded, row.probabilities.data());
  row.logsumexp = softmax.largest + std::log(softmax.sum);
  if (shape.score_function == ScoreFunction::kSoftmax) return row.probabilities.data();
  elementwise_scores(shape.score_function, row.logits.data(), shape.num_experts, row.raw.data());
  row.total = normalize(row.raw.data(), row.padded, row.scores.data());
  return row.scores.data();
}

template <typename acc_t>
MOE_CPU_CLONES void add_row(const acc_t* scores, int64_t num_experts, acc_t* sums) {
  for (int64_t e = 0; e < num_experts; ++e) sums[e] += scores[e];
}

template <typename acc_t>
MOE_CPU_CLONES acc_t weighted_sum(const acc_t* load, const acc_t* scores, int64_t padded) {
  acc_t sums[kRowLanes] = {}, sum = 0;
  for (int64_t e = 0; e < padded; e += kRowLanes) {
    for (int64_t l = 0; l < kRowLanes; ++l) sums[l] += load[e + l] * scores[e + l];
  }
  for (int64_t l = 0; l < kRowLanes; ++l) sum += sums[l];
  return sum;
}

// What the balance loss and the z loss give to each logit; slopes: d score / d logit of each expert on its own.
template <typename scalar_t, typename acc_t>
MOE_CPU_CLONES void row_gradient(const acc_t* load, const acc_t* slopes, const acc_t* probabilities, acc_t mean,
                                 acc_t grad_balance, acc_t grad_logsumexp, int64_t num_experts, scalar_t* grad) {
  for (int64_t e = 0; e < num_experts; ++e) {
    grad[e] = static_cast<scalar_t>(grad_balance * slopes[e] * (load[e] - mean) + grad_logsumexp * probabilities[e]);
  }
}

template <typename acc_t>
MOE_CPU_CLONES void divide_row(acc_t* values, acc_t divisor, int64_t size) {
  for (int64_t e = 0; e < size; ++e) values[e] = divisor == acc_t(0) ? acc_t(0) : values[e] / divisor;
}

// Overwrites the scores with d score / d logit.
template <typename acc_t>
void slopes_of_scores(TokenRow<acc_t>& row, const LossShape& shape) {
  score_slopes(shape.score_function, row.logits.data(), row.raw.data(), shape.num_experts, row.scores.data());
  divide_row(row.scores.data(), row.total, shape.num_experts);
}

// n_e and the counted tokens of every sequence.
template <typename index_t>
void count_tokens(const index_t* ids, const bool* counts, const LossShape& shape, int32_t* loads, int32_t* counted) {
  const int64_t length = shape.sequence_length();
  for (int64_t sequence = 0; sequence < shape.num_sequences; ++sequence) {
    int32_t* loads_here = loads + sequence * shape.num_experts;
    for (int64_t token = sequence * length; token < (sequence + 1) * length; ++token) {
      if (counts && !counts[token]) continue;
      ++counted[sequence];
      for (int64_t slot = token * shape.topk; slot < (token + 1) * shape.topk; ++slot) {
        if (ids[slot] >= 0 && ids[slot] < shape.num_experts) ++loads_here[ids[slot]];
      }
    }
  }
}

// eta_e f_e of the experts of a sequence, padded with 0.
template <typename acc_t>
void weigh_loads(const int32_t* loads, const acc_t* expert_weights, int32_t num_counted, const LossShape& shape,
                 acc_t* weighted) {
  const acc_t factor = shape.load_factor<acc_t>(num_counted);
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    weighted[e] = static_cast<acc_t>(loads[e]) * factor * (expert_weights ? expert_weights[e] : acc_t(1));
  }
}

// Over all sequences; and the sequences where there is one.
struct Totals {
  int64_t tokens = 0, sequences = 0;
  Totals(const int32_t* counted, int64_t num_sequences) {
    for (int64_t s = 0; s < num_sequences; ++s) {
      tokens += counted[s];
      sequences += counted[s] > 0 ? 1 : 0;
    }
    tokens = std::max<int64_t>(tokens, 1);
    sequences = std::max<int64_t>(sequences, 1);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(const Tensor& logits, const Tensor& topk_ids,
                                                         const std::string& score_function,
                                                         const std::optional<Tensor>& token_mask,
                                                         const std::optional<Tensor>& expert_weights,
                                                         const std::string& load, int64_t num_sequences) {
  const LossShape shape =
      check_router_losses(logits, topk_ids, score_function, token_mask, expert_weights, load, num_sequences);
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  const std::optional<Tensor> mask = as_contiguous(token_mask), weights = as_contiguous(expert_weights);
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const ScalarType dtype = router_dtype(logits.scalar_type());
  Tensor balance_loss = make_tensor(logits, {}, dtype);
  Tensor z_loss = make_tensor(logits, {}, dtype);
  Tensor tokens_per_expert = torch::stable::new_zeros(logits, {num_sequences, shape.num_experts}, ScalarType::Int);
  Tensor num_counted = torch::stable::new_zeros(logits, {num_sequences}, ScalarType::Int);

  auto* loads = tokens_per_expert.mutable_data_ptr<int32_t>();
  auto* counted = num_counted.mutable_data_ptr<int32_t>();
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    count_tokens(ids.const_data_ptr<typename decltype(tag)::type>(), counts, shape, loads, counted);
  });
  const Totals totals(counted, num_sequences);

  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    const acc_t* expert_weight = weights ? weights->const_data_ptr<acc_t>() : nullptr;
    const int64_t length = shape.sequence_length();
    const int64_t chunks_per_sequence = (length + kTokensPerChunk - 1) / kTokensPerChunk;
    const int64_t num_chunks = num_sequences * chunks_per_sequence;
    std::vector<acc_t> balances(num_chunks, acc_t(0)), squares(num_chunks, acc_t(0));
    parallel_rows(
        num_chunks, std::min(length, kTokensPerChunk) * shape.num_experts * kBytesPerScore,
        [&](int64_t begin, int64_t end) {
          TokenRow<acc_t> row(shape.num_experts);
          std::vector<acc_t> sums(row.padded), weighted(row.padded, acc_t(0));
          for (int64_t chunk = begin; chunk < end; ++chunk) {
            const int64_t sequence = chunk / chunks_per_sequence;
            const int64_t first = chunk % chunks_per_sequence * kTokensPerChunk;
            const int64_t last = std::min(length, first + kTokensPerChunk);
            std::fill(sums.begin(), sums.end(), acc_t(0));
            for (int64_t token = sequence * length + first; token < sequence * length + last; ++token) {
              if (counts && !counts[token]) continue;
              add_row(score_token(row, logit + token * shape.num_experts, shape), shape.num_experts, sums.data());
              squares[chunk] += row.logsumexp * row.logsumexp;
            }
            weigh_loads(loads + sequence * shape.num_experts, expert_weight, counted[sequence], shape, weighted.data());
            balances[chunk] = weighted_sum(weighted.data(), sums.data(), row.padded) /
                              static_cast<acc_t>(std::max(counted[sequence], 1));
          }
        });
    acc_t balance = 0, square = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      balance += balances[chunk];
      square += squares[chunk];
    }
    *balance_loss.mutable_data_ptr<acc_t>() = balance / static_cast<acc_t>(totals.sequences);
    *z_loss.mutable_data_ptr<acc_t>() = square / static_cast<acc_t>(totals.tokens);
  });
  return {balance_loss, z_loss, tokens_per_expert, num_counted};
}

Tensor router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss, const Tensor& logits,
                              const Tensor& tokens_per_expert, const Tensor& num_counted,
                              const std::string& score_function, const std::optional<Tensor>& token_mask,
                              const std::optional<Tensor>& expert_weights, const std::string& load, int64_t topk) {
  const LossShape shape =
      check_router_losses_backward(grad_balance_loss, grad_z_loss, logits, tokens_per_expert, num_counted,
                                   score_function, token_mask, expert_weights, load, topk);
  const Tensor source = as_contiguous(logits), loads = as_contiguous(tokens_per_expert);
  const Tensor counted_tokens = as_contiguous(num_counted);
  const std::optional<Tensor> mask = as_contiguous(token_mask), weights = as_contiguous(expert_weights);
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  const int32_t* counted = counted_tokens.const_data_ptr<int32_t>();
  const Totals totals(counted, shape.num_sequences);
  Tensor grad_logits = make_tensor(logits, {shape.num_tokens, shape.num_experts});
  dispatch_floating(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* logit = source.const_data_ptr<scalar_t>();
    const acc_t* expert_weight = weights ? weights->const_data_ptr<acc_t>() : nullptr;
    auto* grad = grad_logits.mutable_data_ptr<scalar_t>();
    const acc_t grad_sequence = *grad_balance_loss.const_data_ptr<acc_t>() / static_cast<acc_t>(totals.sequences);
    const acc_t grad_z = *grad_z_loss.const_data_ptr<acc_t>() / static_cast<acc_t>(totals.tokens);
    const int64_t length = shape.sequence_length();
    parallel_rows(shape.num_tokens, shape.num_experts * kBytesPerScore, [&](int64_t begin, int64_t end) {
      TokenRow<acc_t> row(shape.num_experts);
      std::vector<acc_t> weighted(row.padded, acc_t(0));
      int64_t of_sequence = -1;
      for (int64_t token = begin; token < end; ++token) {
        scalar_t* grad_row = grad + token * shape.num_experts;
        if (counts && !counts[token]) {
          std::fill_n(grad_row, shape.num_experts, scalar_t(0));
          continue;
        }
        const int64_t sequence = token / length;
        if (sequence != of_sequence) {
          weigh_loads(loads.const_data_ptr<int32_t>() + sequence * shape.num_experts, expert_weight, counted[sequence],
                      shape, weighted.data());
          of_sequence = sequence;
        }
        const acc_t grad_balance = grad_sequence / static_cast<acc_t>(std::max(counted[sequence], 1));
        const acc_t* scores = score_token(row, logit + token * shape.num_experts, shape);
        const acc_t mean = weighted_sum(weighted.data(), scores, row.padded);
        if (shape.score_function != ScoreFunction::kSoftmax) slopes_of_scores(row, shape);
        row_gradient(weighted.data(), scores, row.probabilities.data(), mean, grad_balance,
                     acc_t(2) * grad_z * row.logsumexp, shape.num_experts, grad_row);
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
