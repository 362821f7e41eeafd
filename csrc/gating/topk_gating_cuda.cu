// topk_gating and its backward on CUDA.
// Mapping: a group of 4 to 32 lanes per token, its logits in registers (above 1024 experts: read again at every use),
//   its selection keys in shared memory (above 1024: a workspace row per warp). Selection: topk_selection.h.
//   Slot j of a token belongs to lane j % lanes.
// Instructions, in the SASS of sm_90a: a round is 57 for the two tokens of a warp up to 128 experts, 40 for the one
// token
//   above, however many experts there are; loads, exponentials and keys add about 25 per 4 experts of a lane.
// `plain` kernels know nothing of GateKnobs: what few gates ask for costs the others no register.
// Traffic per token: E logits read, 8*K bytes written; backward: E + 2*K read, E written (and K of them twice, in L2).
// Bound: launch and latency below some 8192 tokens, memory for large E, the rounds for large K.
#include "topk_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "topk_selection.h"

namespace moe_ext::cuda {
namespace {

// Both bound by the shared memory of a block: keys and slots of kGateWarps tokens in 48 KiB.
constexpr int kMaxPicks = 1024;
constexpr int kMaxGroups = 1024;

// A token's slots in shared memory; slot j is read and written by lane j % lanes alone, but for what select_experts
// writes.
struct SlotMemory {
  int* ids;
  float* scores;  // 0 for slots without an expert
};

// Words of shared memory beside the keys of a token: its slots, before that the keys of its groups.
int slot_words(const GateOptions& options) {
  const int64_t groups = options.topk_groups < options.num_groups ? options.num_groups : 0;
  return static_cast<int>(ceil_div(std::max(options.num_picks() + options.topk, groups), 4) * 4);
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

// Fills in slots.scores and returns the sum of the weights, weight(id, score). `softmax` is that of the whole row; with
// select_then_score the softmax runs over the slots.
template <typename Layout, typename scalar_t, typename Weight>
__device__ float score_slots(const SlotMemory& slots, const scalar_t* row, SoftmaxRow<float> softmax,
                             const GateOptions& options, const Weight& weight) {
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
    float score = 0.f;
    if (slots.ids[j] >= 0) {
      const float logit = static_cast<float>(row[slots.ids[j]]);
      score = is_softmax ? softmax.probability(logit) : elementwise_score(options.score_function, logit);
      total += weight(slots.ids[j], score);
    }
    slots.scores[j] = score;
  });
  return group_sum<Layout::lanes>(total);
}

// The forced id of the token, -1 for none, after it has replaced the last slot where it is absent.
template <typename Layout>
__device__ int force_id(const SlotMemory& slots, const GateKnobs<float>& knobs, const bool* mask,
                        const GateOptions& options, int64_t token, bool inside) {
  const int topk = static_cast<int>(options.topk);
  const int forced = inside ? knobs.forced_id(token, options.num_experts, mask) : -1;
  bool present = false;
  for_slots<Layout>(topk, [&](int j) { present = present || slots.ids[j] == forced; });
  const bool absent = first_lane<Layout::lanes>(present) == Layout::lanes;
  if (forced >= 0 && absent && Layout::lane() == (topk - 1) % Layout::lanes) slots.ids[topk - 1] = forced;
  return forced;
}

// Makes slots empty: those behind the first that reach top_p, those below min_ratio, by the scores of all slots.
template <typename Layout>
__device__ void drop_slots(const SlotMemory& slots, const GateOptions& options, int forced) {
  const int topk = static_cast<int>(options.topk);
  const float top_p = static_cast<float>(options.top_p), min_ratio = static_cast<float>(options.min_ratio);
  __syncwarp();  // scores of other lanes are read
  float before = 0.f;
  int kept = 0;
  // Every lane adds all scores, in the order of the slots.
  for (; kept < topk && !(before >= top_p); ++kept) before += slots.scores[kept];
  const float lowest = min_ratio * slots.scores[0];
  for_slots<Layout>(topk, [&](int j) {
    const bool drop = j >= kept || (j > 0 && slots.scores[j] < lowest);
    if (drop && slots.ids[j] != forced) slots.ids[j] = -1;
  });
  __syncwarp();  // nobody scores the slots again before all have read
}

template <typename scalar_t, typename Layout, bool plain>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    topk_gating_kernel(const scalar_t* __restrict__ logits, const float* __restrict__ selection_bias,
                       const bool* __restrict__ expert_mask, uint32_t* workspace, float* __restrict__ topk_weights,
                       int32_t* __restrict__ topk_ids, float* __restrict__ next_logit, int32_t* __restrict__ next_id,
                       int64_t workspace_stride, int words_of_slots, GateKnobs<float> knobs, GateOptions options) {
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
  int* picks = reinterpret_cast<int*>(words + KeyRow<Layout>::words());
  const int num_picks = plain ? topk : static_cast<int>(options.num_picks());
  const SlotMemory slots{plain ? picks : picks + options.first_rank, reinterpret_cast<float*>(picks + num_picks)};
  int64_t token = Layout::first_token();
  if (token - Layout::row_of_warp() >= options.num_tokens) return;
  do {
    const bool inside = token < options.num_tokens;
    const scalar_t* source = logits + token * num_experts;
    const bool* mask = expert_mask ? expert_mask + token * options.mask_stride : nullptr;
    const ExpertRow<scalar_t, Layout> row(source, mask, inside ? num_experts : 0);
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
    if (grouped) drop_groups(keys, row, reinterpret_cast<uint32_t*>(picks), options, !selection_bias, logit_key);
    select_experts(keys, num_picks, picks);
    const auto weight = [&](int id, float score) { return plain ? score : knobs.weight(options, token, id, score); };
    if constexpr (!plain) {
      if (options.has_next_logit && inside && Layout::lane() == 0) {
        const int next = picks[num_picks - 1];
        next_id[token] = next;
        next_logit[token] = next < 0 ? -INFINITY : static_cast<float>(source[next]);
      }
      const int forced = force_id<Layout>(slots, knobs, mask, options, token, inside);
      if (options.drops_by_score()) {
        score_slots<Layout>(slots, source, softmax, options, weight);
        drop_slots<Layout>(slots, options, forced);
      }
      if (inside && !knobs.keeps(token)) for_slots<Layout>(topk, [&](int j) { slots.ids[j] = -1; });
    }
    const float sum = score_slots<Layout>(slots, source, softmax, options, weight);
    float factor = static_cast<float>(options.scale);
    if (options.renormalize) {
      const float denominator = sum + static_cast<float>(options.renormalize_eps);
      factor = denominator == 0.f ? 0.f : divide(factor, denominator);
    }
    if (inside) {
      for_slots<Layout>(topk, [&](int j) {
        const int id = slots.ids[j];
        float value = slots.scores[j] * factor;
        if (!plain && id >= 0) value = weight(id, slots.scores[j]) * factor * knobs.gain(id);
        topk_weights[token * topk + j] = value;
        topk_ids[token * topk + j] = id;
      });
    }
    token += static_cast<int64_t>(gridDim.x) * Layout::rows_per_block;
  } while (Layout::wide && token < options.num_tokens);
}

template <typename scalar_t, typename Layout, bool plain>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    topk_gating_backward_kernel(const float* __restrict__ grad_topk_weights, const scalar_t* __restrict__ logits,
                                const int32_t* __restrict__ topk_ids, const bool* __restrict__ expert_mask,
                                scalar_t* __restrict__ grad_logits, float* __restrict__ grad_external_weights,
                                int words_of_slots, GateKnobs<float> knobs, GateOptions options) {
  MOE_DYNAMIC_SHARED(int, slot_memory);
  const int num_experts = static_cast<int>(options.num_experts), topk = static_cast<int>(options.topk);
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  const bool from_scores = plain || options.weight_source == WeightSource::kScores;
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
  const auto weight = [&](int id, float score) { return plain ? score : knobs.weight(options, token, id, score); };
  // d loss / d weight before the gain; of slots without an expert only where all is plain, times a weight of 0.
  const auto grad_weight = [&](int j) {
    if constexpr (plain) return gradient[j];
    return slots.ids[j] < 0 ? 0.f : gradient[j] * knobs.gain(slots.ids[j]);
  };
  const SoftmaxRow<float> softmax = whole_row ? softmax_of<Layout>(row) : SoftmaxRow<float>{0.f, 1.f};
  const float sum = score_slots<Layout>(slots, source, softmax, options, weight);
  float product = 0.f;
  for_slots<Layout>(topk, [&](int j) {
    if (plain && inside) product += gradient[j] * slots.scores[j];
    if (!plain && slots.ids[j] >= 0) product += grad_weight(j) * weight(slots.ids[j], slots.scores[j]);
  });
  product = group_sum<Layout::lanes>(product);
  // d loss / d raw weight of slot j is factor * (grad_weight(j) - shared).
  float factor = static_cast<float>(options.scale), shared_gradient = 0.f;
  if (options.renormalize) {
    const float denominator = sum + static_cast<float>(options.renormalize_eps);
    factor = denominator == 0.f ? 0.f : divide(factor, denominator);
    shared_gradient = denominator == 0.f ? 0.f : divide(product, denominator);
  }
  // The sum of weight * gradient is that of score * gradient: where they differ the gradient is 0.
  const bool couples = is_softmax && from_scores && factor != 0.f;
  const float dot = couples ? factor * (product - shared_gradient * sum) : 0.f;
  // Where nothing was chosen the softmax may be over nothing: no gradient, and no 0 * NaN.
  const bool spreads = whole_row && dot != 0.f;
  const float slope = spreads ? divide(-dot, softmax.sum) : 0.f;
  int next = -1;
  float grad_next = 0.f;
  if (!plain && knobs.next_id && inside) {
    next = knobs.next_id[token];
    grad_next = knobs.grad_next_logit[token];
  }
  store_row<Layout>(destination, experts_here, [&](int i) {
    const float logit = row.logit(i);
    const float value = spreads && row.allowed(i) && logit == logit ? slope * expf(logit - softmax.largest) : 0.f;
    return !plain && Layout::expert(i, Layout::lane()) == next ? value + grad_next : value;
  });
  float* grad_external = nullptr;
  if (!plain && options.weight_source == WeightSource::kExternal) {
    grad_external = grad_external_weights + token * num_experts;
    store_row<Layout>(grad_external, experts_here, [](int) { return 0.f; });
  }
  __syncwarp();  // a slot's lane writes over what another lane has written
  for_slots<Layout>(topk, [&](int j) {
    const int id = slots.ids[j];
    if (id < 0) return;
    float grad = factor == 0.f ? 0.f : factor * (grad_weight(j) - shared_gradient);
    if constexpr (!plain) {
      if (!knobs.weighs(id)) grad = 0.f;
      if (grad_external) grad_external[id] = grad;
    }
    float value = 0.f;
    if (from_scores) {
      value = is_softmax ? slots.scores[j] * (grad - dot)
                         : grad * elementwise_score_gradient(options.score_function, static_cast<float>(source[id]));
    }
    destination[id] = static_cast<scalar_t>(!plain && id == next ? value + grad_next : value);
  });
}

void check_limits(const GateOptions& options) {
  MOE_CHECK(options.num_picks() <= kMaxPicks,
            "topk: expected first_rank + topk, one more with return_next_logit, of at most ", kMaxPicks,
            " on CUDA, got ", options.num_picks());
  MOE_CHECK(options.num_groups <= kMaxGroups || options.topk_groups == options.num_groups,
            "num_groups: expected at most ", kMaxGroups, " on CUDA, got ", options.num_groups);
}

// body(std::bool_constant<plain>{}, RowLayout{})
template <typename Body>
void dispatch_gate(bool plain, int64_t num_experts, bool aligned, const Body& body) {
  if (plain) {
    dispatch_experts(num_experts, aligned, [&](auto layout) { body(std::true_type{}, layout); });
  } else {
    dispatch_experts<false>(num_experts, aligned, [&](auto layout) { body(std::false_type{}, layout); });
  }
}

}  // namespace

GateResult topk_gating(const Tensor& logits, const GateTensors& tensors, const GateOptions& options) {
  check_limits(options);
  const DeviceGuard guard(logits.get_device_index());
  const int64_t num_next = options.has_next_logit ? options.num_tokens : 0;
  Tensor topk_weights = make_tensor(logits, {options.num_tokens, options.topk}, ScalarType::Float);
  Tensor topk_ids = make_tensor(logits, {options.num_tokens, options.topk}, ScalarType::Int);
  Tensor next_logit = make_tensor(logits, {num_next}, ScalarType::Float);
  Tensor next_id = make_tensor(logits, {num_next}, ScalarType::Int);
  if (options.num_tokens == 0) return {topk_weights, topk_ids, next_logit, next_id};
  const bool wide = options.num_experts > kMaxRegisterExperts;
  const unsigned wide_blocks =
      static_cast<unsigned>(std::min(ceil_div(options.num_tokens, kGateWarps), kMaxWideBlocks));
  const int64_t workspace_stride = wide ? workspace_row(options.num_experts) : 0;
  Tensor workspace = make_tensor(logits, {wide_blocks * kGateWarps * workspace_stride}, ScalarType::Int);
  auto* keys = reinterpret_cast<uint32_t*>(workspace.mutable_data_ptr<int32_t>());
  const GateKnobs<float> knobs(tensors);
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = rows_are_aligned<scalar_t>(options.num_experts, {logits.const_data_ptr()});
    dispatch_gate(is_plain(tensors, options), options.num_experts, aligned, [&](auto plain, auto layout) {
      using Layout = decltype(layout);
      launch_kernel(topk_gating_kernel<scalar_t, Layout, decltype(plain)::value>,
                    Layout::wide ? wide_blocks : blocks_for_rows<Layout>(options.num_tokens), kGateThreads,
                    shared_bytes<Layout>(options), current_stream(logits), logits.const_data_ptr<scalar_t>(),
                    pointer_if_any<float>(tensors.selection_bias), pointer_if_any<bool>(tensors.expert_mask), keys,
                    topk_weights.mutable_data_ptr<float>(), topk_ids.mutable_data_ptr<int32_t>(),
                    next_logit.mutable_data_ptr<float>(), next_id.mutable_data_ptr<int32_t>(), workspace_stride,
                    slot_words(options), knobs, options);
    });
  });
  return {topk_weights, topk_ids, next_logit, next_id};
}

GateGradients topk_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                                   const GateTensors& tensors, const GateOptions& options) {
  check_limits(options);
  const DeviceGuard guard(logits.get_device_index());
  const bool external = options.weight_source == WeightSource::kExternal;
  Tensor grad_logits = make_tensor(logits, {options.num_tokens, options.num_experts});
  Tensor grad_external_weights =
      make_tensor(logits, {external ? options.num_tokens : 0, options.num_experts}, ScalarType::Float);
  if (options.num_tokens == 0) return {grad_logits, grad_external_weights};
  const GateKnobs<float> knobs(tensors);
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned =
        rows_are_aligned<scalar_t>(options.num_experts, {logits.const_data_ptr(), grad_logits.const_data_ptr()});
    dispatch_gate(is_plain(tensors, options), options.num_experts, aligned, [&](auto plain, auto layout) {
      using Layout = decltype(layout);
      launch_kernel(topk_gating_backward_kernel<scalar_t, Layout, decltype(plain)::value>,
                    blocks_for_rows<Layout>(options.num_tokens), kGateThreads,
                    Layout::rows_per_block * slot_words(options) * sizeof(int), current_stream(logits),
                    grad_topk_weights.const_data_ptr<float>(), logits.const_data_ptr<scalar_t>(),
                    topk_ids.const_data_ptr<int32_t>(), pointer_if_any<bool>(tensors.expert_mask),
                    grad_logits.mutable_data_ptr<scalar_t>(), grad_external_weights.mutable_data_ptr<float>(),
                    slot_words(options), knobs, options);
    });
  });
  return {grad_logits, grad_external_weights};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  using Forward = moe_ext::GateOp<&moe_ext::cuda::topk_gating>;
  using Backward = moe_ext::GateBackwardOp<&moe_ext::cuda::topk_gating_backward>;
  m.impl("topk_gating", TORCH_BOX(&Forward::plain));
  m.impl("topk_gating_backward", TORCH_BOX(&Backward::plain));
  m.impl("topk_gating_general", TORCH_BOX(&Forward::general));
  m.impl("topk_gating_general_backward", TORCH_BOX(&Backward::general));
}
