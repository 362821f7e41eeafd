// What the grouped ops share: how weights lie, which rows belong to which expert, the optional row gather.
//
// expert_offsets is device data: clamped to [0, num_rows], and a group whose end lies before its start is empty. Where
// offsets run backwards, the CPU takes their running maximum; on CUDA the rows concerned are unspecified. Nothing is
// touched out of bounds.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/dtypes.h"
#include "../common/row_maps.h"
#include "../common/tensors.h"
#include "weight_layout.h"

namespace moe_ext {

inline WeightLayout check_weight_layout(const std::string& weight_layout) {
  MOE_CHECK(weight_layout == "enk" || weight_layout == "ekn", "weight_layout: expected enk or ekn, got ",
            weight_layout);
  return weight_layout == "enk" ? WeightLayout::kENK : WeightLayout::kEKN;
}

// The layout under which the same memory multiplies gradients: [E, N, K] read as experts with N inputs, K outputs.
inline const char* transposed_layout(const std::string& weight_layout) {
  return weight_layout == "enk" ? "ekn" : "enk";
}

// One entry per expert; null trains all.
inline void check_trainable_experts(const std::optional<Tensor>& trainable_experts, int64_t num_experts,
                                    const Tensor& rows, const char* rows_name) {
  if (!trainable_experts.has_value()) return;
  check_tensor(*trainable_experts, "trainable_experts", {ScalarType::Bool}, 1, "[num_experts]");
  check_size(*trainable_experts, "trainable_experts", 0, num_experts, "num_experts, the length of expert_offsets - 1");
  check_same_device(*trainable_experts, "trainable_experts", rows, rows_name);
}

// Returns the number of experts.
inline int64_t check_expert_offsets(const Tensor& expert_offsets, const Tensor& rows, const char* rows_name) {
  check_tensor(expert_offsets, "expert_offsets", {ScalarType::Int}, 1, "[num_experts + 1]");
  MOE_CHECK(expert_offsets.size(0) >= 2, "expert_offsets: expected at least 2 entries (num_experts + 1), got ",
            expert_offsets.size(0));
  check_same_device(expert_offsets, "expert_offsets", rows, rows_name);
  return expert_offsets.size(0) - 1;
}

// The row gather of `input`: its maps if there is one. Checks input's rows against them.
inline std::optional<RowMaps> check_gather(const Tensor& input, const std::optional<Tensor>& permuted_to_slot,
                                           const std::optional<Tensor>& slot_to_permuted, int64_t topk) {
  check_tensor(input, "input", {MOE_FLOATING}, 2,
               permuted_to_slot ? "[num_tokens, in_features]" : "[num_rows, in_features]");
  MOE_CHECK(permuted_to_slot.has_value() == slot_to_permuted.has_value(),
            "gather: expected both permuted_to_slot and slot_to_permuted, or neither");
  if (!permuted_to_slot.has_value()) {
    check_fits_int32(input.size(0), "input, number of rows");
    return std::nullopt;
  }
  const RowMaps maps = check_row_maps(*permuted_to_slot, *slot_to_permuted, topk);
  check_size(input, "input", 0, maps.num_tokens, "num_tokens, the length of slot_to_permuted / topk");
  check_same_device(*permuted_to_slot, "permuted_to_slot", input, "input");
  return maps;
}

// Boundaries [num_experts + 1] on the host, monotone. For offsets on the CPU only.
inline std::vector<int64_t> group_boundaries(const Tensor& expert_offsets, int64_t num_rows) {
  const Tensor offsets = as_contiguous(expert_offsets);
  const auto* values = offsets.const_data_ptr<int32_t>();
  std::vector<int64_t> boundaries(offsets.numel());
  int64_t reached = 0;
  for (size_t i = 0; i < boundaries.size(); ++i) {
    reached = std::max(reached, std::clamp<int64_t>(values[i], 0, num_rows));
    boundaries[i] = reached;
  }
  return boundaries;
}

}  // namespace moe_ext
