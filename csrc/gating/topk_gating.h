// topk_gating: logits [T, E] -> topk_weights [T, K] and topk_ids [T, K]; topk_gating_backward: back to the logits.
// topk_gating_general takes the arguments that few gates need as well: autograd's cost per call in Python grows with
// the square of the number of arguments, which the other gates need not pay. The order in which the arguments act is
// that of the docstring in python/moe_ext/ops/gating.py.
#pragma once

#include <limits>
#include <tuple>

#include "../common/tensors.h"
#include "scores.h"

namespace moe_ext {

enum class WeightSource { kScores, kOnes, kExternal };

struct GateOptions {
  int64_t num_tokens, num_experts, topk;
  ScoreFunction score_function;
  bool select_then_score;
  int64_t first_rank, num_groups, topk_groups;
  // NaN, with which nothing compares, where not given.
  double top_p, min_ratio;
  WeightSource weight_source;
  bool renormalize;
  double renormalize_eps, scale;
  bool has_next_logit;
  // 0: no mask, else the distance between the masks of two tokens: 0 experts (one mask for all) or num_experts.
  bool has_mask;
  int64_t mask_stride;

  // Experts that the selection must find: those passed over, the slots, and the one behind them.
  MOE_HOST_DEVICE int64_t num_picks() const { return first_rank + topk + (has_next_logit ? 1 : 0); }
  MOE_HOST_DEVICE bool drops_by_score() const { return top_p == top_p || min_ratio == min_ratio; }
};

// The tensors of a call beside the logits; contiguous after `contiguous`.
struct GateTensors {
  std::optional<Tensor> selection_bias, expert_mask, forced_ids, keep_tokens, external_weights, zero_weight_experts,
      expert_gain, next_id, grad_next_logit;

  GateTensors contiguous() const {
    return {as_contiguous(selection_bias), as_contiguous(expert_mask),      as_contiguous(forced_ids),
            as_contiguous(keep_tokens),    as_contiguous(external_weights), as_contiguous(zero_weight_experts),
            as_contiguous(expert_gain),    as_contiguous(next_id),          as_contiguous(grad_next_logit)};
  }
};

// Where slots are the best experts as they come, and weights their scores: most gates, which take the shorter way.
inline bool is_plain(const GateTensors& tensors, const GateOptions& options) {
  return options.first_rank == 0 && !options.has_next_logit && !options.drops_by_score() && !tensors.forced_ids &&
         !tensors.keep_tokens && options.weight_source == WeightSource::kScores && !tensors.zero_weight_experts &&
         !tensors.expert_gain && !tensors.next_id;
}

template <typename T>
const T* pointer_if_any(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// The part of the arguments that few gates use, for the kernels; null where not given.
template <typename acc_t>
struct GateKnobs {
  const int32_t* forced_ids;
  const int64_t* wide_forced_ids;
  const bool* keep_tokens;
  const acc_t* external_weights;
  const bool* zero_weight_experts;
  const acc_t* expert_gain;
  const int32_t* next_id;
  const acc_t* grad_next_logit;

  explicit GateKnobs(const GateTensors& tensors)
      : forced_ids(nullptr),
        wide_forced_ids(nullptr),
        keep_tokens(pointer_if_any<bool>(tensors.keep_tokens)),
        external_weights(pointer_if_any<acc_t>(tensors.external_weights)),
        zero_weight_experts(pointer_if_any<bool>(tensors.zero_weight_experts)),
        expert_gain(pointer_if_any<acc_t>(tensors.expert_gain)),
        next_id(pointer_if_any<int32_t>(tensors.next_id)),
        grad_next_logit(pointer_if_any<acc_t>(tensors.grad_next_logit)) {
    if (!tensors.forced_ids.has_value()) return;
    if (tensors.forced_ids->scalar_type() == ScalarType::Int) {
      forced_ids = tensors.forced_ids->const_data_ptr<int32_t>();
    } else {
      wide_forced_ids = tensors.forced_ids->const_data_ptr<int64_t>();
    }
  }

  // -1 for none. `mask` is the token's, null for all experts.
  MOE_HOST_DEVICE int32_t forced_id(int64_t token, int64_t num_experts, const bool* mask) const {
    const int64_t id = forced_ids ? forced_ids[token] : wide_forced_ids ? wide_forced_ids[token] : -1;
    return id < 0 || id >= num_experts || (mask && !mask[id]) ? -1 : static_cast<int32_t>(id);
  }
  MOE_HOST_DEVICE bool keeps(int64_t token) const { return !keep_tokens || keep_tokens[token]; }
  // Whether the weight of an expert hangs on anything.
  MOE_HOST_DEVICE bool weighs(int64_t expert) const { return !zero_weight_experts || !zero_weight_experts[expert]; }
  // The weight of a slot before it is renormalised.
  MOE_HOST_DEVICE acc_t weight(const GateOptions& options, int64_t token, int64_t expert, acc_t score) const {
    if (!weighs(expert)) return acc_t(0);
    switch (options.weight_source) {
      case WeightSource::kOnes: return acc_t(1);
      case WeightSource::kExternal: return external_weights[token * options.num_experts + expert];
      default: return score;
    }
  }
  MOE_HOST_DEVICE acc_t gain(int64_t expert) const { return expert_gain ? expert_gain[expert] : acc_t(1); }
};

inline bool parse_score_order(const std::string& name) {
  MOE_CHECK(name == "score_then_select" || name == "select_then_score",
            "score_order: expected score_then_select or select_then_score, got ", name);
  return name == "select_then_score";
}

inline WeightSource parse_weight_source(const std::string& name) {
  if (name == "scores") return WeightSource::kScores;
  if (name == "ones") return WeightSource::kOnes;
  if (name == "external") return WeightSource::kExternal;
  MOE_CHECK(false, "weight_source: expected scores, ones or external, got ", name);
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

// A vector with one entry per token or per expert, if it is given.
inline void check_vector(const std::optional<Tensor>& tensor, const char* name,
                         std::initializer_list<ScalarType> dtypes, const Tensor& logits, int64_t axis) {
  if (!tensor.has_value()) return;
  check_tensor(*tensor, name, dtypes, 1, axis == 0 ? "[num_tokens]" : "[num_experts]");
  check_size(*tensor, name, 0, logits.size(axis), axis == 0 ? "num_tokens, as in logits" : "num_experts, as in logits");
  check_same_device(*tensor, name, logits, "logits");
}

// What the forward and the backward have in common.
inline GateOptions check_gate(const Tensor& logits, int64_t topk, const std::string& score_function,
                              const std::string& score_order, const std::string& weight_source, bool renormalize,
                              double renormalize_eps, double scale, const GateTensors& tensors) {
  check_tensor(logits, "logits", {MOE_FLOATING}, 2, "[num_tokens, num_experts]");
  MOE_CHECK(logits.size(1) >= 1, "logits: expected at least one expert, got ", describe(logits));
  check_at_least(topk, "topk", 1);
  const int64_t num_experts = logits.size(1);
  const ScalarType weight_dtype = router_dtype(logits.scalar_type());
  check_fits_int32(num_experts, "num_experts");
  MOE_CHECK(topk <= num_experts, "topk: expected at most num_experts = ", num_experts, ", got ", topk);
  GateOptions options{};
  options.num_tokens = logits.size(0);
  options.num_experts = num_experts;
  options.topk = topk;
  options.score_function = parse_score_function(score_function);
  options.select_then_score = parse_score_order(score_order);
  options.num_groups = options.topk_groups = 1;
  options.top_p = options.min_ratio = std::numeric_limits<double>::quiet_NaN();
  options.weight_source = parse_weight_source(weight_source);
  options.renormalize = renormalize;
  MOE_CHECK(renormalize_eps >= 0, "renormalize_eps: expected a number >= 0, got ", renormalize_eps);
  options.renormalize_eps = renormalize_eps;
  options.scale = scale;
  check_mask(tensors.expert_mask, logits, options);
  const bool external = options.weight_source == WeightSource::kExternal;
  MOE_CHECK(tensors.external_weights.has_value() == external, "external_weights: expected ",
            external ? "a tensor with weight_source external, got none" : "none with weight_source ",
            external ? "" : weight_source);
  if (external) {
    check_tensor(*tensors.external_weights, "external_weights", {weight_dtype}, 2, "[num_tokens, num_experts]");
    check_size(*tensors.external_weights, "external_weights", 0, logits.size(0), "num_tokens, as in logits");
    check_size(*tensors.external_weights, "external_weights", 1, num_experts, "num_experts, as in logits");
    check_same_device(*tensors.external_weights, "external_weights", logits, "logits");
  }
  check_vector(tensors.zero_weight_experts, "zero_weight_experts", {ScalarType::Bool}, logits, 1);
  check_vector(tensors.expert_gain, "expert_gain", {weight_dtype}, logits, 1);
  return options;
}

inline void check_selection(const Tensor& logits, int64_t first_rank, int64_t num_groups, int64_t topk_groups,
                            std::optional<double> top_p, std::optional<double> min_ratio, bool return_next_logit,
                            const GateTensors& tensors, GateOptions& options) {
  const int64_t num_experts = options.num_experts;
  check_at_least(num_groups, "num_groups", 1);
  MOE_CHECK(num_experts % num_groups == 0, "num_groups: expected a divisor of num_experts = ", num_experts, ", got ",
            num_groups);
  MOE_CHECK(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups: expected 1 to num_groups = ", num_groups,
            ", got ", topk_groups);
  const int64_t available = topk_groups * (num_experts / num_groups);
  MOE_CHECK(options.topk <= available, "topk: expected at most ", available,
            ", the experts of topk_groups groups, got ", options.topk);
  MOE_CHECK(first_rank >= 0 && first_rank <= available - options.topk, "first_rank: expected 0 to ",
            available - options.topk, ", the experts to choose from less topk, got ", first_rank);
  options.first_rank = first_rank;
  options.num_groups = num_groups;
  options.topk_groups = topk_groups;
  options.has_next_logit = return_next_logit;
  if (top_p.has_value()) {
    MOE_CHECK(*top_p > 0 && *top_p <= 1, "top_p: expected a number above 0 and at most 1, got ", *top_p);
    if (*top_p < 1) options.top_p = *top_p;
  }
  if (min_ratio.has_value()) {
    MOE_CHECK(*min_ratio >= 0 && *min_ratio <= 1, "min_ratio: expected a number from 0 to 1, got ", *min_ratio);
    options.min_ratio = *min_ratio;
  }
  check_vector(tensors.selection_bias, "selection_bias", {router_dtype(logits.scalar_type())}, logits, 1);
  check_vector(tensors.forced_ids, "forced_ids", {ScalarType::Int, ScalarType::Long}, logits, 0);
  check_vector(tensors.keep_tokens, "keep_tokens", {ScalarType::Bool}, logits, 0);
}

inline void check_gate_gradients(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                                 const GateTensors& tensors, const GateOptions& options) {
  const ScalarType weight_dtype = router_dtype(logits.scalar_type());
  check_size(topk_ids, "topk_ids", 0, options.num_tokens, "num_tokens, as in logits");
  check_tensor(grad_topk_weights, "grad_topk_weights", {weight_dtype}, 2, "[num_tokens, topk]");
  check_size(grad_topk_weights, "grad_topk_weights", 0, options.num_tokens, "num_tokens, as in logits");
  check_size(grad_topk_weights, "grad_topk_weights", 1, options.topk, "topk, as in topk_ids");
  check_same_device(topk_ids, "topk_ids", logits, "logits");
  check_same_device(grad_topk_weights, "grad_topk_weights", logits, "logits");
  MOE_CHECK(tensors.next_id.has_value() == tensors.grad_next_logit.has_value(),
            "grad_next_logit: expected exactly where next_id is given");
  check_vector(tensors.next_id, "next_id", {ScalarType::Int}, logits, 0);
  check_vector(tensors.grad_next_logit, "grad_next_logit", {weight_dtype}, logits, 0);
}

// topk_weights, topk_ids, next_logit, next_id; the last two are empty unless they are asked for.
using GateResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// grad_logits, grad_external_weights; the latter is empty where no weight is external.
using GateGradients = std::tuple<Tensor, Tensor>;

#define MOE_DECLARE_TOPK_GATING                                                                                     \
  GateResult topk_gating(const Tensor& logits, const GateTensors& tensors, const GateOptions& options);             \
  GateGradients topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids, \
                                     const GateTensors& tensors, const GateOptions& options);
namespace cpu {
MOE_DECLARE_TOPK_GATING
}
namespace cuda {
MOE_DECLARE_TOPK_GATING
}
#undef MOE_DECLARE_TOPK_GATING

// The ops as their schemas have them: everything checked, then one of the backends.
template <GateResult (*backend)(const Tensor&, const GateTensors&, const GateOptions&)>
struct GateOp {
  static GateResult general(const Tensor& logits, int64_t topk, const std::string& score_function,
                            const std::string& score_order, const std::optional<Tensor>& selection_bias,
                            const std::optional<Tensor>& expert_mask, int64_t num_groups, int64_t topk_groups,
                            bool renormalize, double renormalize_eps, double scale, int64_t first_rank,
                            const std::optional<Tensor>& forced_ids, std::optional<double> top_p,
                            std::optional<double> min_ratio, const std::optional<Tensor>& keep_tokens,
                            const std::string& weight_source, const std::optional<Tensor>& external_weights,
                            const std::optional<Tensor>& zero_weight_experts, const std::optional<Tensor>& expert_gain,
                            bool return_next_logit) {
    const GateTensors tensors{selection_bias,      expert_mask, forced_ids, keep_tokens, external_weights,
                              zero_weight_experts, expert_gain, {},         {}};
    GateOptions options = check_gate(logits, topk, score_function, score_order, weight_source, renormalize,
                                     renormalize_eps, scale, tensors);
    check_selection(logits, first_rank, num_groups, topk_groups, top_p, min_ratio, return_next_logit, tensors, options);
    return backend(as_contiguous(logits), tensors.contiguous(), options);
  }

  static std::tuple<Tensor, Tensor> plain(const Tensor& logits, int64_t topk, const std::string& score_function,
                                          const std::string& score_order, const std::optional<Tensor>& selection_bias,
                                          const std::optional<Tensor>& expert_mask, int64_t num_groups,
                                          int64_t topk_groups, bool renormalize, double renormalize_eps, double scale) {
    const GateResult result =
        general(logits, topk, score_function, score_order, selection_bias, expert_mask, num_groups, topk_groups,
                renormalize, renormalize_eps, scale, 0, {}, {}, {}, {}, "scores", {}, {}, {}, false);
    return {std::get<0>(result), std::get<1>(result)};
  }
};

template <GateGradients (*backend)(const Tensor&, const Tensor&, const Tensor&, const GateTensors&, const GateOptions&)>
struct GateBackwardOp {
  static GateGradients general(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                               const std::string& score_function, const std::string& score_order,
                               const std::optional<Tensor>& expert_mask, bool renormalize, double renormalize_eps,
                               double scale, const std::optional<Tensor>& grad_next_logit,
                               const std::optional<Tensor>& next_id, const std::string& weight_source,
                               const std::optional<Tensor>& external_weights,
                               const std::optional<Tensor>& zero_weight_experts,
                               const std::optional<Tensor>& expert_gain) {
    const GateTensors tensors{{},      expert_mask,    {}, {}, external_weights, zero_weight_experts, expert_gain,
                              next_id, grad_next_logit};
    check_tensor(topk_ids, "topk_ids", {ScalarType::Int}, 2, "[num_tokens, topk]");
    const GateOptions options = check_gate(logits, topk_ids.size(1), score_function, score_order, weight_source,
                                           renormalize, renormalize_eps, scale, tensors);
    check_gate_gradients(grad_topk_weights, logits, topk_ids, tensors, options);
    return backend(as_contiguous(grad_topk_weights), as_contiguous(logits), as_contiguous(topk_ids),
                   tensors.contiguous(), options);
  }

  static Tensor plain(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                      const std::string& score_function, const std::string& score_order,
                      const std::optional<Tensor>& expert_mask, bool renormalize, double renormalize_eps,
                      double scale) {
    return std::get<0>(general(grad_topk_weights, logits, topk_ids, score_function, score_order, expert_mask,
                               renormalize, renormalize_eps, scale, {}, {}, "scores", {}, {}, {}));
  }
};

}  // namespace moe_ext
