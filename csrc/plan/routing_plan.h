// routing_plan: topk_ids [T, K] -> rows sorted by expert, stable, with capacity and row alignment.
#pragma once

#include <cstdint>
#include <tuple>

#include "../common/checks.h"
#include "../common/ordered_key.h"
#include "plan_partition.h"

namespace moe_ext {

struct PlanShape {
  int64_t num_slots;    // T * K
  int64_t num_experts;  // E
  int64_t capacity;     // rows an expert may hold; num_slots where there is no limit
  int64_t row_alignment;
  int64_t num_rows;  // M, the static bound
};

inline PlanShape check_routing_plan(const Tensor& topk_ids, int64_t num_experts, std::optional<int64_t> capacity,
                                    const std::optional<Tensor>& drop_scores, int64_t row_alignment) {
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int, ScalarType::Long}, 2, "[num_tokens, topk]");
  MOE_CHECK(topk_ids.size(1) >= 1, "topk_ids: expected at least one column, got ", describe(topk_ids));
  check_at_least(num_experts, "num_experts", 1);
  check_at_least(row_alignment, "row_alignment", 1);
  if (capacity.has_value()) check_at_least(*capacity, "capacity", 0);
  if (drop_scores.has_value()) {
    MOE_CHECK(capacity.has_value(), "drop_scores: expected only together with capacity, got capacity=None");
    check_tensor(*drop_scores, "drop_scores", {ScalarType::Float}, 2, "[num_tokens, topk]");
    check_size(*drop_scores, "drop_scores", 0, topk_ids.size(0), "num_tokens, as in topk_ids");
    check_size(*drop_scores, "drop_scores", 1, topk_ids.size(1), "topk, as in topk_ids");
    check_same_device(*drop_scores, "drop_scores", topk_ids, "topk_ids");
  }
  PlanShape shape{};
  shape.num_slots = topk_ids.numel();
  shape.num_experts = num_experts;
  shape.capacity = std::min(capacity.value_or(shape.num_slots), shape.num_slots);
  shape.row_alignment = row_alignment;
  check_fits_int32(num_experts, "num_experts");
  check_fits_int32(row_alignment, "row_alignment");
  // Mirrors RoutingPlan.row_bound: only an expert that holds a row is padded, by at most row_alignment - 1 rows.
  const int64_t filled = std::min(shape.num_slots, num_experts * shape.capacity);
  shape.num_rows = filled + std::min(num_experts, filled) * (row_alignment - 1);
  check_fits_int32(shape.num_slots, "num_tokens * topk");
  check_fits_int32(shape.num_rows, "rows of the plan");
  return shape;
}

#define MOE_DECLARE_ROUTING_PLAN                                                    \
  std::tuple<Tensor, Tensor, Tensor, Tensor> routing_plan(                          \
      const Tensor& topk_ids, int64_t num_experts, std::optional<int64_t> capacity, \
      const std::optional<Tensor>& drop_scores, int64_t row_alignment);
namespace cpu {
MOE_DECLARE_ROUTING_PLAN
}
namespace cuda {
MOE_DECLARE_ROUTING_PLAN
}
#undef MOE_DECLARE_ROUTING_PLAN

}  // namespace moe_ext
