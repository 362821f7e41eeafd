// low_rank_experts: out[t] = sum over slots j of w[t, j] * sum over ranks i of (down[e, i] . x[t]) * up[e, i] with
// e = topk_ids[t, j]: low-rank adapters chosen per token, rank-one experts at rank 1. Only the chosen rows of `down`
// and `up` are read. An id outside [0, num_experts) adds nothing. The dot products ("projection") are kept for the
// backward.
//
// The backward has the same form: with u[t, j, i] = up[e, i] . grad_output[t] the gradient of x is the op itself on
// (grad_output, up, down); that of w[t, j] is sum over i of projection * u; of down[e, i] the sum over the slots of e
// of w * u * x[t]; of up[e, i] the sum of w * projection * grad_output[t]. The last two run over a routing plan's rows.
#pragma once

#include <tuple>
#include <vector>

#include "../common/dtypes.h"
#include "../common/output_mask.h"
#include "../common/row_maps.h"
#include "../common/tensors.h"

namespace moe_ext {

struct LowRankShape {
  int64_t num_tokens;    // T
  int64_t in_features;   // H
  int64_t out_features;  // O
  int64_t num_experts;   // E
  int64_t rank;          // r
  int64_t topk;          // K

  int64_t components() const { return topk * rank; }  // of a token, slot by slot
  // The op that takes gradients back to the input.
  LowRankShape transposed() const { return {num_tokens, out_features, in_features, num_experts, rank, topk}; }
};

// Which gradients low_rank_experts_backward computes: output_mask, in the order of its results. What is not asked for
// comes back empty and costs nothing.
struct LowRankGradientMask {
  bool input, lora_a, lora_b, topk_weights;

  // Do the dot products of grad_output with the rows of lora_b matter?
  bool back() const { return input || lora_a || topk_weights; }
};

inline LowRankGradientMask check_low_rank_output_mask(const std::vector<bool>& output_mask) {
  check_output_mask(output_mask, 4);
  return {output_mask[0], output_mask[1], output_mask[2], output_mask[3]};
}

struct LowRankGradients {
  Tensor input, lora_a, lora_b, topk_weights;
  Tensor back;  // [T, K * r]: the dot products with grad_output
};

inline LowRankGradients new_low_rank_gradients(const LowRankShape& shape, const LowRankGradientMask& wanted,
                                               const Tensor& input, const Tensor& topk_weights) {
  return {make_tensor(input, {wanted.input ? shape.num_tokens : 0, shape.in_features}),
          make_tensor(input, {wanted.lora_a ? shape.num_experts : 0, shape.rank, shape.in_features}),
          make_tensor(input, {wanted.lora_b ? shape.num_experts : 0, shape.rank, shape.out_features}),
          make_tensor(topk_weights, {wanted.topk_weights ? shape.num_tokens : 0, shape.topk}),
          make_tensor(topk_weights, {wanted.back() ? shape.num_tokens : 0, shape.components()})};
}

// A token's components stand in shared memory on CUDA, 8 bytes each.
constexpr int64_t kMostComponents = 8192;

inline LowRankShape check_low_rank_experts(const Tensor& input, const Tensor& lora_a, const Tensor& lora_b,
                                           const Tensor& topk_ids, const Tensor& topk_weights) {
  check_tensor(input, "input", {MOE_FLOATING}, 2, "[num_tokens, in_features]");
  check_tensor(lora_a, "lora_a", {input.scalar_type()}, 3, "[num_experts, rank, in_features]");
  check_tensor(lora_b, "lora_b", {input.scalar_type()}, 3, "[num_experts, rank, out_features]");
  check_tensor(topk_ids, "topk_ids", {ScalarType::Int, ScalarType::Long}, 2, "[num_tokens, topk]");
  check_tensor(topk_weights, "topk_weights", {router_dtype(input.scalar_type())}, 2, "[num_tokens, topk]");
  const LowRankShape shape = {input.size(0),  input.size(1),  lora_b.size(2),
                              lora_a.size(0), lora_a.size(1), topk_ids.size(1)};
  check_size(lora_a, "lora_a", 2, shape.in_features, "in_features, as in input");
  check_size(lora_b, "lora_b", 0, shape.num_experts, "num_experts, as in lora_a");
  check_size(lora_b, "lora_b", 1, shape.rank, "rank, as in lora_a");
  check_size(topk_ids, "topk_ids", 0, shape.num_tokens, "num_tokens, as in input");
  check_size(topk_weights, "topk_weights", 0, shape.num_tokens, "num_tokens, as in input");
  check_size(topk_weights, "topk_weights", 1, shape.topk, "topk, as in topk_ids");
  check_at_least(shape.num_experts, "lora_a, number of experts", 1);
  check_at_least(shape.rank, "lora_a, rank", 1);
  check_at_least(shape.topk, "topk_ids, topk", 1);
  check_fits_int32(shape.num_tokens * shape.topk, "topk_ids, number of slots");
  check_fits_int32(shape.num_experts * shape.rank, "lora_a, number of rows");
  MOE_CHECK(shape.components() <= kMostComponents, "topk * rank: expected at most ", kMostComponents, ", got ",
            shape.components());
  check_same_device(lora_a, "lora_a", input, "input");
  check_same_device(lora_b, "lora_b", input, "input");
  check_same_device(topk_ids, "topk_ids", input, "input");
  check_same_device(topk_weights, "topk_weights", input, "input");
  return shape;
}

inline LowRankShape check_low_rank_experts_backward(const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& lora_a, const Tensor& lora_b, const Tensor& topk_ids,
                                                    const Tensor& topk_weights, const Tensor& projection,
                                                    const Tensor& expert_offsets, const Tensor& permuted_to_slot) {
  const LowRankShape shape = check_low_rank_experts(input, lora_a, lora_b, topk_ids, topk_weights);
  check_tensor(grad_output, "grad_output", {input.scalar_type()}, 2, "[num_tokens, out_features]");
  check_size(grad_output, "grad_output", 0, shape.num_tokens, "num_tokens, as in input");
  check_size(grad_output, "grad_output", 1, shape.out_features, "out_features, as in lora_b");
  check_tensor(projection, "projection", {topk_weights.scalar_type()}, 2, "[num_tokens, topk * rank]");
  check_size(projection, "projection", 0, shape.num_tokens, "num_tokens, as in input");
  check_size(projection, "projection", 1, shape.components(), "topk * rank");
  check_tensor(expert_offsets, "expert_offsets", {ScalarType::Int}, 1, "[num_experts + 1]");
  check_size(expert_offsets, "expert_offsets", 0, shape.num_experts + 1, "num_experts + 1");
  check_tensor(permuted_to_slot, "permuted_to_slot", {ScalarType::Int}, 1, "[num_rows]");
  check_same_device(grad_output, "grad_output", input, "input");
  check_same_device(projection, "projection", input, "input");
  check_same_device(expert_offsets, "expert_offsets", input, "input");
  check_same_device(permuted_to_slot, "permuted_to_slot", input, "input");
  return shape;
}

#define MOE_DECLARE_LOW_RANK_EXPERTS                                                                              \
  std::tuple<Tensor, Tensor> low_rank_experts(const Tensor& input, const Tensor& lora_a, const Tensor& lora_b,    \
                                              const Tensor& topk_ids, const Tensor& topk_weights);                \
  std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_experts_backward(                                           \
      const Tensor& grad_output, const Tensor& input, const Tensor& lora_a, const Tensor& lora_b,                 \
      const Tensor& topk_ids, const Tensor& topk_weights, const Tensor& projection, const Tensor& expert_offsets, \
      const Tensor& permuted_to_slot, std::vector<bool> output_mask);
namespace cpu {
MOE_DECLARE_LOW_RANK_EXPERTS
}
namespace cuda {
MOE_DECLARE_LOW_RANK_EXPERTS
}
#undef MOE_DECLARE_LOW_RANK_EXPERTS

}  // namespace moe_ext
