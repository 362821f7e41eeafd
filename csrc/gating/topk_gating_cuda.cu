// topk_gating and its backward on CUDA.
// Mapping: a group of 4 to 32 lanes per token, its logits in registers (above 1024 experts: read again at every use),
//   its selection keys in shared memory (above 1024: a workspace row per warp). Selection: topk_selection.h.
//   Slot j of a token belongs to lane j % lanes.
// Instructions, in the SASS of sm_90a: a round is 57 for the two tokens of a warp up to 128 experts, 40 for the one
// token
//   above, however many experts there are; loads, exponentials and keys add about 25 per 4 experts of a lane.
// Traffic per token: E logits read, 8*K bytes written; backward: E + 2*K read, E written (and K of them twice, in L2).
// Bound: launch and latency below some 8192 tokens, memory for large E, the rounds for large K.
#include "topk_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/optional_tensor.h"
#include "topk_selection.h"

namespace moe_ext::cuda {
namespace {

// Both bound by the shared memory of a block: keys and slots of kGateWarps tokens in 48 KiB.
constexpr int kMaxTopk = 1024;
constexpr int kMaxGroups = 1024;

// A token's slots in shared memory; slot j is read and written by lane j % lanes alone, but for what select_experts
// writes.
struct SlotMemory {
  int* ids;
  float* raw;  // weights before renormalisation and scale; 0 for slots without an expert
};

// Words of shared memory beside the keys of a token: its slots, before that the keys of its groups.
int slot_words(const GateOptions& options) {
  const int64_t groups = options.topk_groups < options.num_groups ? options.num_groups : 0;
  return static_cast<int>(ceil_div(std::max(2 * options.topk, groups), 4) * 4);
}

template <typename Layout>
size_t shared_bytes(const GateOptions& options) {
  return Layout::rows_per_block * (KeyRow<Layout>::words() + slot_words(options)) * sizeof(uint32_t);
}

// body(j) for the slots of this lane.
template <typename Layout, typename Body>
__device__ void for_slots(int topk, const Body& body) {
  for (int j = Layout::lane(); j < topk; j += Layout::lanes) body(j);
}

// Fills in slots.raw and returns its sum. `softmax` is that of the whole row; with select_then_score the softmax runs
// over the slots.
template <typename Layout, typename scalar_t>
__device__ float raw_weights(const SlotMemory& slots, const scalar_t* row, SoftmaxRow<float> softmax,
                             const GateOptions& options) {
  const int topk = static_cast<int>(options.topk);
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  if (is_softmax && options.select_then_score) {
    float largest = -INFINITY, sum = 0.f;
    for_slots<Layout>(topk, [&](int j) {
      if (slots.ids[j] >= 0) largest = fmaxf(largest, static_cast<float>(row[slots.ids[j]]));
    });
    largest = group_max<Layout::lanes>(largest);
    for_slots<Layout>(topk, [&](int j) {
      // As in the whole row, a NaN logit makes its own weight NaN, no other.
      const float logit = slots.ids[j] >= 0 ? static_cast<float>(row[slots.ids[j]]) : NAN;
      if (logit == logit) sum += expf(logit - largest);
    });
    softmax = {largest, group_sum<Layout::lanes>(sum)};
  }
  float total = 0.f;
  for_slots<Layout>(topk, [&](int j) {
    float raw = 0.f;
    if (slots.ids[j] >= 0) {
      const float logit = static_cast<float>(row[slots.ids[j]]);
      raw = is_softmax ? softmax.probability(logit) : elementwise_score(options.score_function, logit);
    }
    slots.raw[j] = raw;
    total += raw;
  });
  return group_sum<Layout::lanes>(total);
}

template <typename scalar_t, typename Layout>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    topk_gating_kernel(const scalar_t* __restrict__ logits, const float* __restrict__ selection_bias,
                       const bool* __restrict__ expert_mask, uint32_t* workspace, float* __restrict__ topk_weights,
                       int32_t* __restrict__ topk_ids, int64_t workspace_stride, int words_of_slots,
                       GateOptions options) {
  using Quad = Vector<uint32_t, 4>;
  MOE_DYNAMIC_SHARED(Quad, shared);
  const int num_experts = static_cast<int>(options.num_experts), topk = static_cast<int>(options.topk);
  const bool grouped = options.topk_groups < options.num_groups;
  const bool needs_softmax = options.score_function == ScoreFunction::kSoftmax && !options.select_then_score;
  // Without bias and groups the order of the scores is the order of the logits, where rounding makes no ties.
  const bool by_logit = options.select_then_score || (!selection_bias && !grouped);
  uint32_t* words =
      reinterpret_cast<uint32_t*>(shared) + Layout::row_of_block() * (KeyRow<Layout>::words() + words_of_slots);
  const KeyRow<Layout> keys(Layout::wide ? workspace + Layout::first_token() * workspace_stride : words, num_experts);
  int* ids = reinterpret_cast<int*>(words + KeyRow<Layout>::words());
  const SlotMemory slots{ids, reinterpret_cast<float*>(ids + topk)};
  int64_t token = Layout::first_token();
  if (token - Layout::row_of_warp() >= options.num_tokens) return;
  do {
    const bool inside = token < options.num_tokens;
    const scalar_t* source = logits + token * num_experts;
    const ExpertRow<scalar_t, Layout> row(source, expert_mask ? expert_mask + token * options.mask_stride : nullptr,
                                          inside ? num_experts : 0);
    const SoftmaxRow<float> softmax = needs_softmax ? softmax_of<Layout>(row) : SoftmaxRow<float>{0.f, 1.f};
    const auto logit_key = [&](int i) -> uint32_t { return row.allowed(i) ? selection_key(row.logit(i)) : 0; };
    if (by_logit && !selection_bias) {
      keys.store(row, logit_key);
    } else {
      keys.store(row, [&](int i) -> uint32_t {
        if (!row.allowed(i)) return 0;
        float value = row.logit(i);
        if (!by_logit) {
          value = options.score_function == ScoreFunction::kSoftmax ? softmax.probability(value)
                                                                    : elementwise_score(options.score_function, value);
        }
        if (selection_bias) value += selection_bias[Layout::expert(i, Layout::lane())];
        return selection_key(value);
      });
    }
    __syncwarp();
    // Unbiased, groups are compared by their scores, and the experts inside them by their logits.
    if (grouped) drop_groups(keys, row, reinterpret_cast<uint32_t*>(ids), options, !selection_bias, logit_key);
    select_experts(keys, topk, slots.ids);
    const float sum = raw_weights<Layout>(slots, source, softmax, options);
    float factor = static_cast<float>(options.scale);
    if (options.renormalize) {
      const float denominator = sum + static_cast<float>(options.renormalize_eps);
      factor = denominator == 0.f ? 0.f : divide(factor, denominator);
    }
    if (inside) {
      for_slots<Layout>(topk, [&](int j) {
        topk_weights[token * topk + j] = slots.raw[j] * factor;
        topk_ids[token * topk + j] = slots.ids[j];
      });
    }
    token += static_cast<int64_t>(gridDim.x) * Layout::rows_per_block;
  } while (Layout::wide && token < options.num_tokens);
}

template <typename scalar_t, typename Layout>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    topk_gating_backward_kernel(const float* __restrict__ grad_topk_weights, const scalar_t* __restrict__ logits,
                                const int32_t* __restrict__ topk_ids, const bool* __restrict__ expert_mask,
                                scalar_t* __restrict__ grad_logits, int words_of_slots, GateOptions options) {
  MOE_DYNAMIC_SHARED(int, slot_memory);
  const int num_experts = static_cast<int>(options.num_experts), topk = static_cast<int>(options.topk);
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  const bool whole_row = is_softmax && !options.select_then_score;
  int* ids = slot_memory + Layout::row_of_block() * words_of_slots;
  const SlotMemory slots{ids, reinterpret_cast<float*>(ids + topk)};
  const int64_t token = Layout::first_token();
  if (token - Layout::row_of_warp() >= options.num_tokens) return;
  const bool inside = token < options.num_tokens;
  const int experts_here = inside ? num_experts : 0;
  const scalar_t* source = logits + token * num_experts;
  scalar_t* destination = grad_logits + token * num_experts;
  ExpertRow<scalar_t, Layout> row(source, expert_mask ? expert_mask + token * options.mask_stride : nullptr,
                                  experts_here);
  const float* gradient = grad_topk_weights + token * topk;
  for_slots<Layout>(topk, [&](int j) {
    const int id = inside ? topk_ids[token * topk + j] : -1;
    slots.ids[j] = id < num_experts ? id : -1;
  });
  const SoftmaxRow<float> softmax = whole_row ? softmax_of<Layout>(row) : SoftmaxRow<float>{0.f, 1.f};
  const float sum = raw_weights<Layout>(slots, source, softmax, options);
  float product = 0.f;
  for_slots<Layout>(topk, [&](int j) {
    if (inside) product += gradient[j] * slots.raw[j];
  });
  product = group_sum<Layout::lanes>(product);
  // d loss / d raw weight of slot j is factor * (gradient[j] - shared).
  float factor = static_cast<float>(options.scale), shared_gradient = 0.f;
  if (options.renormalize) {
    const float denominator = sum + static_cast<float>(options.renormalize_eps);
    factor = denominator == 0.f ? 0.f : divide(factor, denominator);
    shared_gradient = denominator == 0.f ? 0.f : divide(product, denominator);
  }
  const float dot = is_softmax && factor != 0.f ? factor * (product - shared_gradient * sum) : 0.f;
  // Where nothing was chosen the softmax may be over nothing: no gradient, and no 0 * NaN.
  const bool spreads = whole_row && dot != 0.f;
  const float slope = spreads ? divide(-dot, softmax.sum) : 0.f;
  store_row<Layout>(destination, experts_here, [&](int i) {
    const float logit = row.logit(i);
    return spreads && row.allowed(i) && logit == logit ? slope * expf(logit - softmax.largest) : 0.f;
  });
  __syncwarp();  // a slot's lane writes over what another lane has written
  for_slots<Layout>(topk, [&](int j) {
    const int id = slots.ids[j];
    if (id < 0) return;
    const float grad = factor == 0.f ? 0.f : factor * (gradient[j] - shared_gradient);
    const float value = is_softmax
                            ? slots.raw[j] * (grad - dot)
                            : grad * elementwise_score_gradient(options.score_function, static_cast<float>(source[id]));
    destination[id] = static_cast<scalar_t>(value);
  });
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
  const unsigned wide_blocks =
      static_cast<unsigned>(std::min(ceil_div(options.num_tokens, kGateWarps), kMaxWideBlocks));
  const int64_t workspace_stride = wide ? workspace_row(options.num_experts) : 0;
  Tensor workspace = torch::stable::new_empty(logits, {wide_blocks * kGateWarps * workspace_stride}, ScalarType::Int);
  auto* keys = reinterpret_cast<uint32_t*>(workspace.mutable_data_ptr<int32_t>());
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = rows_are_aligned<scalar_t>(options.num_experts, {source.const_data_ptr()});
    dispatch_experts(options.num_experts, aligned, [&](auto layout) {
      using Layout = decltype(layout);
      launch_kernel(topk_gating_kernel<scalar_t, Layout>,
                    Layout::wide ? wide_blocks : blocks_for_rows<Layout>(options.num_tokens), kGateThreads,
                    shared_bytes<Layout>(options), current_stream(logits), source.const_data_ptr<scalar_t>(),
                    bias ? bias->const_data_ptr<float>() : nullptr, mask ? mask->const_data_ptr<bool>() : nullptr, keys,
                    topk_weights.mutable_data_ptr<float>(), topk_ids.mutable_data_ptr<int32_t>(), workspace_stride,
                    slot_words(options), options);
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
    const bool aligned =
        rows_are_aligned<scalar_t>(options.num_experts, {source.const_data_ptr(), grad_logits.const_data_ptr()});
    dispatch_experts(options.num_experts, aligned, [&](auto layout) {
      using Layout = decltype(layout);
      launch_kernel(topk_gating_backward_kernel<scalar_t, Layout>, blocks_for_rows<Layout>(options.num_tokens),
                    kGateThreads, Layout::rows_per_block * slot_words(options) * sizeof(int), current_stream(logits),
                    gradient.const_data_ptr<float>(), source.const_data_ptr<scalar_t>(),
                    chosen.const_data_ptr<int32_t>(), mask ? mask->const_data_ptr<bool>() : nullptr,
                    grad_logits.mutable_data_ptr<scalar_t>(), slot_words(options), options);
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("topk_gating", TORCH_BOX(&moe_ext::cuda::topk_gating));
  m.impl("topk_gating_backward", TORCH_BOX(&moe_ext::cuda::topk_gating_backward));
}
