// topk_gating and its backward on CUDA.
// Mapping: one warp per token, its logits in registers (above 1024 experts: read again at every use, the keys in a
//   workspace row per warp). Selection is topk rounds of a warp-wide maximum over 64-bit candidates (key, then the
//   lower id), each below the last one found; slot j ends in lane j % 32.
// Traffic per token: E logits read, 8*K bytes written; backward: E + 2*K read, E written. Above 1024 experts a round
//   reads the 4*E bytes of its keys, from L2.
// Bound: memory for large E and small K, the shuffles of K rounds else.
#include "topk_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/optional_tensor.h"
#include "warp_row.h"

namespace moe_ext::cuda {
namespace {

constexpr int kSlotsPerLane = 4;
constexpr int kMaxTopk = kSlotsPerLane * kWarpSize;
constexpr int kMaxGroups = 2 * kWarpSize;

// What the selection compares, as an integer of the same order: 0 for no candidate, 1 for NaN. + 0 makes one zero of
// the two.
constexpr uint32_t kNanKey = 1;
__device__ uint32_t key_of(float value) { return max(ordered_key(value + 0.f), kNanKey); }

__device__ float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// A key over the complement of its expert: larger is better, the lower id wins ties, 0 is none.
__device__ uint64_t candidate(uint32_t key, int expert) {
  return key == 0 ? 0 : static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}
__device__ uint32_t key_in(uint64_t found) { return static_cast<uint32_t>(found >> 32); }
__device__ int expert_in(uint64_t found) {
  return found == 0 ? -1 : static_cast<int>(0xffffffffu - static_cast<uint32_t>(found));
}

constexpr uint64_t kAboveAll = ~uint64_t{0};

template <typename Keys>
__device__ uint64_t best_below(const Keys& keys, int count, int lane, int first, int end, uint64_t below) {
  uint64_t best = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int expert = lane + i * kWarpSize;
    const uint64_t value = expert >= first && expert < end ? candidate(keys[i], expert) : 0;
    if (value < below && value > best) best = value;
  }
  return warp_max(best);
}

// The groups that stay, as bits. A group's score is the sum of its two best values (DeepSeek-V3); NaN does not count.
// Lane g holds the scores of groups g and g + 32.
template <typename Keys>
__device__ uint64_t best_groups(const Keys& keys, int count, int lane, int num_groups, int group_size,
                                int topk_groups) {
  LaneValues<uint32_t, 2> scores(nullptr, lane);
  scores[0] = scores[1] = 0;
  for (int group = 0; group < num_groups; ++group) {
    const int first = group * group_size;
    const uint64_t best = best_below(keys, count, lane, first, first + group_size, kAboveAll);
    const uint64_t second = best_below(keys, count, lane, first, first + group_size, best);
    float score = key_in(best) > kNanKey ? value_of(key_in(best)) : -INFINITY;
    if (key_in(second) > kNanKey && value_of(key_in(second)) > -INFINITY) score += value_of(key_in(second));
    if (lane == group % kWarpSize) {
      if (group < kWarpSize)
        scores[0] = key_of(score);
      else
        scores[1] = key_of(score);
    }
  }
  uint64_t kept = 0, below = kAboveAll;
  for (int i = 0; i < topk_groups; ++i) {
    below = best_below(scores, 2, lane, 0, num_groups, below);
    kept |= uint64_t{1} << expert_in(below);
  }
  return kept;
}

// Fills in the keys that the topk rounds compare.
template <typename Row, typename Keys>
__device__ void make_keys(const Row& row, SoftmaxRow<float> softmax, const float* selection_bias, int lane,
                          const GateOptions& options, Keys& keys) {
  const int num_experts = static_cast<int>(options.num_experts);
  const bool grouped = options.topk_groups < options.num_groups;
  // Without bias and groups the order of the scores is the order of the logits, where rounding makes no ties.
  const bool by_logit = options.select_then_score || (!selection_bias && !grouped);
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    const int expert = lane + i * kWarpSize;
    float value = row.logit(i);
    if (!by_logit) {
      value = options.score_function == ScoreFunction::kSoftmax ? softmax.probability(value)
                                                                : elementwise_score(options.score_function, value);
    }
    if (selection_bias && expert < num_experts) value += selection_bias[expert];
    keys[i] = row.allowed(i) ? key_of(value) : 0;
  }
  if (!grouped) return;
  const int group_size = num_experts / static_cast<int>(options.num_groups);
  const uint64_t kept = best_groups(keys, row.count(), lane, static_cast<int>(options.num_groups), group_size,
                                    static_cast<int>(options.topk_groups));
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    const int expert = lane + i * kWarpSize;
    if (expert < num_experts && !(kept >> (expert / group_size) & 1)) keys[i] = 0;
    if (!selection_bias && keys[i] != 0) keys[i] = key_of(row.logit(i));
  }
}

// A token's slots, spread over the lanes: slot j in lane j % 32.
struct Slots {
  int ids[kSlotsPerLane];
  float logits[kSlotsPerLane];
  float raw[kSlotsPerLane];  // weights before renormalisation and scale; 0 for slots without an expert
};

template <typename scalar_t>
__device__ void load_slot_logits(Slots& slots, const scalar_t* row, int num_experts) {
#pragma unroll
  for (int i = 0; i < kSlotsPerLane; ++i) {
    const int id = slots.ids[i];
    slots.logits[i] = id >= 0 && id < num_experts ? static_cast<float>(row[id]) : 0.f;
  }
}

__device__ float sum_slots(const float (&values)[kSlotsPerLane]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kSlotsPerLane; ++i) sum += values[i];
  return warp_sum(sum);
}

// `softmax` is that of the whole row; with select_then_score it is replaced by the softmax over the slots.
__device__ void raw_weights(Slots& slots, SoftmaxRow<float> softmax, const GateOptions& options) {
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  if (is_softmax && options.select_then_score) {
    float largest = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      if (slots.ids[i] >= 0 && slots.logits[i] > largest) largest = slots.logits[i];
    }
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      // As in the whole row, a NaN logit makes its own weight NaN, no other.
      if (slots.ids[i] >= 0 && slots.logits[i] == slots.logits[i]) sum += expf(slots.logits[i] - largest);
    }
    softmax = {largest, warp_sum(sum)};
  }
#pragma unroll
  for (int i = 0; i < kSlotsPerLane; ++i) {
    slots.raw[i] = slots.ids[i] < 0 ? 0.f
                   : is_softmax     ? softmax.probability(slots.logits[i])
                                    : elementwise_score(options.score_function, slots.logits[i]);
  }
}

template <typename scalar_t, int per_lane>
__global__ void __launch_bounds__(kGateThreads)
    topk_gating_kernel(const scalar_t* __restrict__ logits, const float* __restrict__ selection_bias,
                       const bool* __restrict__ expert_mask, uint32_t* __restrict__ workspace,
                       float* __restrict__ topk_weights, int32_t* __restrict__ topk_ids, int64_t workspace_stride,
                       GateOptions options) {
  const int lane = threadIdx.x % kWarpSize, num_experts = static_cast<int>(options.num_experts);
  const int topk = static_cast<int>(options.topk);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGateWarps;
  LaneValues<uint32_t, per_lane> keys(workspace + first_token * workspace_stride, lane);
  for (int64_t token = first_token; token < options.num_tokens; token += stride) {
    const scalar_t* source = logits + token * num_experts;
    const WarpRow<scalar_t, per_lane> row(source, expert_mask ? expert_mask + token * options.mask_stride : nullptr,
                                          num_experts, lane);
    const bool needs_softmax = options.score_function == ScoreFunction::kSoftmax && !options.select_then_score;
    const SoftmaxRow<float> softmax = needs_softmax ? softmax_of(row) : SoftmaxRow<float>{0.f, 1.f};
    make_keys(row, softmax, selection_bias, lane, options, keys);
    Slots slots;
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) slots.ids[i] = -1;
    uint64_t found = kAboveAll;
    for (int j = 0; j < topk; ++j) {
      found = best_below(keys, row.count(), lane, 0, num_experts, found);
      if (found == 0) break;
#pragma unroll
      for (int i = 0; i < kSlotsPerLane; ++i) {
        if (j == lane + i * kWarpSize) slots.ids[i] = expert_in(found);
      }
    }
    load_slot_logits(slots, source, num_experts);
    raw_weights(slots, softmax, options);
    float factor = static_cast<float>(options.scale);
    if (options.renormalize) {
      const float sum = sum_slots(slots.raw) + static_cast<float>(options.renormalize_eps);
      factor = sum == 0.f ? 0.f : factor / sum;
    }
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      const int j = lane + i * kWarpSize;
      if (j >= topk) continue;
      topk_weights[token * topk + j] = slots.raw[i] * factor;
      topk_ids[token * topk + j] = slots.ids[i];
    }
  }
}

template <typename scalar_t, int per_lane>
__global__ void __launch_bounds__(kGateThreads)
    topk_gating_backward_kernel(const float* __restrict__ grad_topk_weights, const scalar_t* __restrict__ logits,
                                const int32_t* __restrict__ topk_ids, const bool* __restrict__ expert_mask,
                                scalar_t* __restrict__ grad_logits, GateOptions options) {
  const int lane = threadIdx.x % kWarpSize, num_experts = static_cast<int>(options.num_experts);
  const int topk = static_cast<int>(options.topk);
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGateWarps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
       token < options.num_tokens; token += stride) {
    const scalar_t* source = logits + token * num_experts;
    scalar_t* destination = grad_logits + token * num_experts;
    const WarpRow<scalar_t, per_lane> row(source, expert_mask ? expert_mask + token * options.mask_stride : nullptr,
                                          num_experts, lane);
    const bool whole_row = is_softmax && !options.select_then_score;
    const SoftmaxRow<float> softmax = whole_row ? softmax_of(row) : SoftmaxRow<float>{0.f, 1.f};
    Slots slots;
    float grad[kSlotsPerLane];
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      const int j = lane + i * kWarpSize;
      const int id = j < topk ? topk_ids[token * topk + j] : -1;
      slots.ids[i] = id >= 0 && id < num_experts ? id : -1;
      grad[i] = j < topk ? grad_topk_weights[token * topk + j] : 0.f;
    }
    load_slot_logits(slots, source, num_experts);
    raw_weights(slots, softmax, options);
    float sum = 1.f, shared = 0.f;
    if (options.renormalize) {
      float products[kSlotsPerLane];
#pragma unroll
      for (int i = 0; i < kSlotsPerLane; ++i) products[i] = grad[i] * slots.raw[i];
      sum = sum_slots(slots.raw) + static_cast<float>(options.renormalize_eps);
      shared = sum == 0.f ? 0.f : sum_slots(products) / sum;
    }
    // From here on grad is d loss / d raw weight.
    float products[kSlotsPerLane];
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      grad[i] = sum == 0.f ? 0.f : static_cast<float>(options.scale) * (grad[i] - shared) / sum;
      products[i] = grad[i] * slots.raw[i];
    }
    const float dot = is_softmax ? sum_slots(products) : 0.f;
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      const int expert = lane + i * kWarpSize;
      if (expert >= num_experts) continue;
      const float logit = row.logit(i);
      // Where nothing was chosen the softmax may be over nothing: no gradient, and no 0 * NaN.
      const bool spreads = whole_row && row.allowed(i) && logit == logit && dot != 0.f;
      destination[expert] = static_cast<scalar_t>(spreads ? -dot * softmax.probability(logit) : 0.f);
    }
    __syncwarp();  // a slot's lane writes over what another lane has written
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) {
      if (slots.ids[i] < 0) continue;
      const float gradient = is_softmax ? slots.raw[i] * (grad[i] - dot)
                                        : grad[i] * elementwise_score_gradient(options.score_function, slots.logits[i]);
      destination[slots.ids[i]] = static_cast<scalar_t>(gradient);
    }
    __syncwarp();
  }
}

void check_limits(const GateOptions& options) {
  MOE_CHECK(options.topk <= kMaxTopk, "topk: expected at most ", kMaxTopk, " on CUDA, got ", options.topk);
  MOE_CHECK(options.num_groups <= kMaxGroups || options.topk_groups == options.num_groups,
            "num_groups: expected at most ", kMaxGroups, " on CUDA, got ", options.num_groups);
}

}  // namespace

std::tuple<Tensor, Tensor> topk_gating(const Tensor& logits, int64_t topk, const std::string& score_function,
                                       const std::string& score_order, const std::optional<Tensor>& selection_bias,
                                       const std::optional<Tensor>& expert_mask, int64_t num_groups,
                                       int64_t topk_groups, bool renormalize, double renormalize_eps, double scale) {
  const GateOptions options = check_topk_gating(logits, topk, score_function, score_order, selection_bias, expert_mask,
                                                num_groups, topk_groups, renormalize, renormalize_eps, scale);
  check_limits(options);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor source = torch::stable::contiguous(logits);
  const std::optional<Tensor> bias = contiguous_if_any(selection_bias), mask = contiguous_if_any(expert_mask);
  Tensor topk_weights = torch::stable::new_empty(logits, {options.num_tokens, topk}, ScalarType::Float);
  Tensor topk_ids = torch::stable::new_empty(logits, {options.num_tokens, topk}, ScalarType::Int);
  if (options.num_tokens == 0) return {topk_weights, topk_ids};
  const bool wide = options.num_experts > kMaxRegisterExperts;
  const unsigned blocks = blocks_for_rows(options.num_tokens, wide ? kMaxWideBlocks : kMaxBlocks);
  const int64_t workspace_stride = wide ? workspace_row(options.num_experts) : 0;
  Tensor workspace = torch::stable::new_empty(logits, {blocks * kGateWarps * workspace_stride}, ScalarType::Int);
  auto* keys = reinterpret_cast<uint32_t*>(workspace.mutable_data_ptr<int32_t>());
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_experts(options.num_experts, [&](auto per_lane) {
      launch_kernel(topk_gating_kernel<scalar_t, decltype(per_lane)::value>, blocks, kGateThreads, 0,
                    current_stream(logits), source.const_data_ptr<scalar_t>(),
                    bias ? bias->const_data_ptr<float>() : nullptr, mask ? mask->const_data_ptr<bool>() : nullptr, keys,
                    topk_weights.mutable_data_ptr<float>(), topk_ids.mutable_data_ptr<int32_t>(), workspace_stride,
                    options);
    });
  });
  return {topk_weights, topk_ids};
}

Tensor topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                            const std::string& score_function, const std::string& score_order,
                            const std::optional<Tensor>& expert_mask, bool renormalize, double renormalize_eps,
                            double scale) {
  const GateOptions options = check_topk_gating_backward(grad_topk_weights, logits, topk_ids, score_function,
                                                         score_order, expert_mask, renormalize, renormalize_eps, scale);
  check_limits(options);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor gradient = torch::stable::contiguous(grad_topk_weights), source = torch::stable::contiguous(logits);
  const Tensor chosen = torch::stable::contiguous(topk_ids);
  const std::optional<Tensor> mask = contiguous_if_any(expert_mask);
  Tensor grad_logits = torch::stable::new_empty(logits, {options.num_tokens, options.num_experts});
  if (options.num_tokens == 0) return grad_logits;
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_experts(options.num_experts, [&](auto per_lane) {
      launch_kernel(topk_gating_backward_kernel<scalar_t, decltype(per_lane)::value>,
                    blocks_for_rows(options.num_tokens), kGateThreads, 0, current_stream(logits),
                    gradient.const_data_ptr<float>(), source.const_data_ptr<scalar_t>(),
                    chosen.const_data_ptr<int32_t>(), mask ? mask->const_data_ptr<bool>() : nullptr,
                    grad_logits.mutable_data_ptr<scalar_t>(), options);
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("topk_gating", TORCH_BOX(&moe_ext::cuda::topk_gating));
  m.impl("topk_gating_backward", TORCH_BOX(&moe_ext::cuda::topk_gating_backward));
}
