// topk_gating and its backward on CUDA.
// Mapping: one warp per token, its logits in registers. Selection is topk rounds of a warp-wide maximum over 64-bit
//   candidates (key, then the lower id), each below the last one found; slot j ends in lane j % 32.
// Traffic per token: E logits read, 8*K bytes written; backward: E + 2*K read, E written.
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

// Larger is better; 0 is no candidate. NaN sorts below every number, the lower expert id wins ties.
__device__ uint64_t candidate(float key, int expert, bool allowed) {
  if (!allowed) return 0;
  // + 0 makes one zero of the two.
  return static_cast<uint64_t>(ordered_key(key + 0.f) + 1u) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

__device__ int expert_of(uint64_t found) {
  return found == 0 ? -1 : static_cast<int>(0xffffffffu - static_cast<uint32_t>(found));
}

template <int per_lane>
__device__ uint64_t best_below(const float (&keys)[per_lane], const bool (&allowed)[per_lane], int lane, int first,
                               int end, uint64_t below) {
  uint64_t best = 0;
#pragma unroll
  for (int i = 0; i < per_lane; ++i) {
    const int expert = lane + i * kWarpSize;
    const uint64_t value = candidate(keys[i], expert, allowed[i] && expert >= first && expert < end);
    if (value < below && value > best) best = value;
  }
  return warp_max(best);
}

__device__ float key_of(uint64_t found) {
  const auto key = static_cast<uint32_t>(found >> 32) - 1u;
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  return __uint_as_float(bits);
}

// Takes the experts outside the best topk_groups groups out of `allowed`. A group's score is the sum of its two best
// keys (DeepSeek-V3); NaN keys do not count. Lane g holds the scores of groups g and g + 32.
template <int per_lane>
__device__ void limit_to_groups(const float (&keys)[per_lane], bool (&allowed)[per_lane], int lane, int num_experts,
                                int num_groups, int topk_groups) {
  const int group_size = num_experts / num_groups;
  // ordered_key(NaN) + 1 == 1: candidates from here on up are numbers.
  constexpr uint64_t kNumbers = uint64_t{2} << 32;
  float scores[2] = {-INFINITY, -INFINITY};
  for (int group = 0; group < num_groups; ++group) {
    const int first = group * group_size;
    const uint64_t best = best_below(keys, allowed, lane, first, first + group_size, ~uint64_t{0});
    const uint64_t second = best < kNumbers ? 0 : best_below(keys, allowed, lane, first, first + group_size, best);
    float score = best < kNumbers ? -INFINITY : key_of(best);
    if (second >= kNumbers && key_of(second) > -INFINITY) score += key_of(second);
    if (lane == group % kWarpSize) scores[group / kWarpSize] = score;
  }
  uint64_t kept = 0, below = ~uint64_t{0};
  for (int i = 0; i < topk_groups; ++i) {
    const bool inside[2] = {lane < num_groups, lane + kWarpSize < num_groups};
    below = best_below<2>(scores, inside, lane, 0, num_groups, below);
    kept |= uint64_t{1} << expert_of(below);
  }
#pragma unroll
  for (int i = 0; i < per_lane; ++i) {
    const int expert = lane + i * kWarpSize;
    if (expert < num_experts) allowed[i] = allowed[i] && (kept >> (expert / group_size) & 1);
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
      if (slots.ids[i] >= 0) sum += expf(slots.logits[i] - largest);
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
                       const bool* __restrict__ expert_mask, float* __restrict__ topk_weights,
                       int32_t* __restrict__ topk_ids, GateOptions options) {
  const int lane = threadIdx.x % kWarpSize, num_experts = static_cast<int>(options.num_experts);
  const int topk = static_cast<int>(options.topk);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGateWarps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
       token < options.num_tokens; token += stride) {
    const scalar_t* source = logits + token * num_experts;
    WarpRow<per_lane> row;
    row.load(source, expert_mask ? expert_mask + token * options.mask_stride : nullptr, num_experts, lane);
    const bool grouped = options.topk_groups < options.num_groups;
    const bool needs_softmax = options.score_function == ScoreFunction::kSoftmax && !options.select_then_score;
    const SoftmaxRow<float> softmax = needs_softmax ? row.softmax() : SoftmaxRow<float>{0.f, 1.f};
    float keys[per_lane];
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      // Without bias or groups the order of the scores is the order of the logits, where rounding makes no ties.
      keys[i] = row.logits[i];
      if (!selection_bias && !grouped) continue;
      const int expert = lane + i * kWarpSize;
      if (needs_softmax) {
        keys[i] = softmax.probability(row.logits[i]);
      } else if (options.score_function != ScoreFunction::kSoftmax) {
        keys[i] = elementwise_score(options.score_function, row.logits[i]);
      }
      if (selection_bias && expert < num_experts) keys[i] += selection_bias[expert];
    }
    if (grouped) {
      limit_to_groups(keys, row.allowed, lane, num_experts, static_cast<int>(options.num_groups),
                      static_cast<int>(options.topk_groups));
      if (!selection_bias) {
#pragma unroll
        for (int i = 0; i < per_lane; ++i) keys[i] = row.logits[i];
      }
    }
    Slots slots;
#pragma unroll
    for (int i = 0; i < kSlotsPerLane; ++i) slots.ids[i] = -1;
    uint64_t found = ~uint64_t{0};
    for (int j = 0; j < topk; ++j) {
      found = best_below(keys, row.allowed, lane, 0, num_experts, found);
      if (found == 0) break;
#pragma unroll
      for (int i = 0; i < kSlotsPerLane; ++i) {
        if (j == lane + i * kWarpSize) slots.ids[i] = expert_of(found);
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
    WarpRow<per_lane> row;
    row.load(source, expert_mask ? expert_mask + token * options.mask_stride : nullptr, num_experts, lane);
    const bool whole_row = is_softmax && !options.select_then_score;
    const SoftmaxRow<float> softmax = whole_row ? row.softmax() : SoftmaxRow<float>{0.f, 1.f};
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
    for (int i = 0; i < per_lane; ++i) {
      const int expert = lane + i * kWarpSize;
      if (expert >= num_experts) continue;
      const bool spreads = whole_row && row.allowed[i] && row.logits[i] == row.logits[i];
      destination[expert] = static_cast<scalar_t>(spreads ? -dot * softmax.probability(row.logits[i]) : 0.f);
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
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_experts(options.num_experts, [&](auto per_lane) {
      launch_kernel(topk_gating_kernel<scalar_t, decltype(per_lane)::value>, blocks_for_rows(options.num_tokens),
                    kGateThreads, 0, current_stream(logits), source.const_data_ptr<scalar_t>(),
                    bias ? bias->const_data_ptr<float>() : nullptr, mask ? mask->const_data_ptr<bool>() : nullptr,
                    topk_weights.mutable_data_ptr<float>(), topk_ids.mutable_data_ptr<int32_t>(), options);
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
