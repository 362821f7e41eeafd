// expert_choice_gating and its backward on CUDA.
//   stats_kernel      a group of lanes per token: the row's softmax (largest logit, sum of exponentials)
//   transpose_kernel  32 x 32 tiles through shared memory: scores by expert [E, T], both sides coalesced
//   threshold_kernel  one block per expert: radix select of its capacity-th best score, then the last token that a tie
//                     at that score still admits; up to kCachedKeys tokens the five passes read keys in shared memory
//   emit_kernel       32 x 32 tiles back: every score against its expert's threshold
// Traffic: logits read once (softmax: twice, the second time from L2), scores written once and read twice (six times
// above kCachedKeys tokens, from L2 where T*E*4 bytes fit), weights and ids written once. Bound: memory, the passes of
// one expert for small E.
#include "expert_choice_gating.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "expert_row.h"

namespace moe_ext::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kTileRowsPerPass = 8;

struct Threshold {
  uint32_t key;
  int32_t last_tied_token;  // -1: none at the threshold is taken
};

__device__ float score_of(ScoreFunction function, float logit, SoftmaxRow<float> softmax) {
  return function == ScoreFunction::kSoftmax ? softmax.probability(logit) : elementwise_score(function, logit);
}

// + 0 makes one zero of the two.
__device__ uint32_t key_of(float score) { return ordered_key(score + 0.f); }

template <typename scalar_t, typename Layout>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    stats_kernel(const scalar_t* __restrict__ logits, SoftmaxRow<float>* __restrict__ stats, ExpertChoiceShape shape) {
  const int num_experts = static_cast<int>(shape.num_experts);
  const int64_t token = Layout::first_token();
  if (token - Layout::row_of_warp() >= shape.num_tokens) return;
  const bool inside = token < shape.num_tokens;
  const ExpertRow<scalar_t, Layout> row(logits + token * num_experts, nullptr, inside ? num_experts : 0);
  const SoftmaxRow<float> softmax = softmax_of<Layout>(row);
  if (inside && Layout::lane() == 0) stats[token] = softmax;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kTile* kTileRowsPerPass)
    transpose_kernel(const scalar_t* __restrict__ logits, const SoftmaxRow<float>* __restrict__ stats,
                     float* __restrict__ scores, ExpertChoiceShape shape) {
  __shared__ float tile[kTile][kTile + 1];
  const int column = threadIdx.x % kTile, first_row = threadIdx.x / kTile;
  const int64_t expert_tiles = ceil_div(shape.num_experts, kTile), token_tiles = ceil_div(shape.num_tokens, kTile);
  for (int64_t item = blockIdx.x; item < expert_tiles * token_tiles; item += gridDim.x) {
    const int64_t first_token = item / expert_tiles * kTile, first_expert = item % expert_tiles * kTile;
    for (int r = first_row; r < kTile; r += kTileRowsPerPass) {
      const int64_t token = first_token + r, expert = first_expert + column;
      if (token < shape.num_tokens && expert < shape.num_experts) {
        tile[r][column] =
            score_of(shape.score_function, static_cast<float>(logits[token * shape.num_experts + expert]),
                     shape.score_function == ScoreFunction::kSoftmax ? stats[token] : SoftmaxRow<float>{});
      }
    }
    __syncthreads();
    for (int r = first_row; r < kTile; r += kTileRowsPerPass) {
      const int64_t token = first_token + column, expert = first_expert + r;
      if (token < shape.num_tokens && expert < shape.num_experts) {
        scores[expert * shape.num_tokens + token] = tile[column][r];
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    threshold_kernel(const float* __restrict__ scores, Threshold* __restrict__ thresholds, ExpertChoiceShape shape) {
  MOE_DYNAMIC_SHARED(uint32_t, key_cache);
  for (int64_t expert = blockIdx.x; expert < shape.num_experts; expert += gridDim.x) {
    const float* mine = scores + expert * shape.num_tokens;
    const auto key_of_token = [&](int64_t token) { return key_of(mine[token]); };
    const CachedKeys key(key_of_token, shape.num_tokens, key_cache);
    int ties = 0;
    const uint32_t threshold = select_threshold(key, shape.num_tokens, static_cast<int>(shape.capacity), &ties);
    int seen = 0;
    for (int64_t first = 0; first < shape.num_tokens && seen < ties; first += kSelectThreads) {
      const int64_t token = first + threadIdx.x;
      const bool tied = token < shape.num_tokens && key(token) == threshold;
      int total;
      const int rank = seen + block_exclusive_scan(tied, &total);
      if (tied && rank == ties - 1) thresholds[expert] = {threshold, static_cast<int32_t>(token)};
      seen += total;
    }
    __syncthreads();
  }
}

// Compares the very scores that the thresholds come from: scores computed again might differ in the last bit.
__global__ void __launch_bounds__(kTile* kTileRowsPerPass)
    emit_kernel(const float* __restrict__ scores, const Threshold* __restrict__ thresholds,
                float* __restrict__ topk_weights, int32_t* __restrict__ topk_ids, ExpertChoiceShape shape) {
  __shared__ float tile[kTile][kTile + 1];
  const int column = threadIdx.x % kTile, first_row = threadIdx.x / kTile;
  const int64_t expert_tiles = ceil_div(shape.num_experts, kTile), token_tiles = ceil_div(shape.num_tokens, kTile);
  for (int64_t item = blockIdx.x; item < expert_tiles * token_tiles; item += gridDim.x) {
    const int64_t first_token = item / expert_tiles * kTile, first_expert = item % expert_tiles * kTile;
    for (int r = first_row; r < kTile; r += kTileRowsPerPass) {
      const int64_t token = first_token + column, expert = first_expert + r;
      if (shape.capacity > 0 && token < shape.num_tokens && expert < shape.num_experts) {
        tile[r][column] = scores[expert * shape.num_tokens + token];
      }
    }
    __syncthreads();
    for (int r = first_row; r < kTile; r += kTileRowsPerPass) {
      const int64_t token = first_token + r, expert = first_expert + column;
      if (token >= shape.num_tokens || expert >= shape.num_experts) continue;
      bool chosen = false;
      if (shape.capacity > 0) {
        const Threshold threshold = thresholds[expert];
        const uint32_t key = key_of(tile[column][r]);
        chosen = key > threshold.key || (key == threshold.key && token <= threshold.last_tied_token);
      }
      topk_weights[token * shape.num_experts + expert] = chosen ? tile[column][r] : 0.f;
      topk_ids[token * shape.num_experts + expert] = chosen ? static_cast<int32_t>(expert) : -1;
    }
    __syncthreads();
  }
}

// The gradients of a lane's experts, 0 for those that did not choose the token: in registers, read again where wide.
template <typename Layout, bool wide = Layout::wide>
struct ChosenGradients {
  float values[Layout::per_lane];
  uint32_t mask = 0;

  __device__ ChosenGradients(const float* gradient, const int32_t* ids, int num_experts) {
#pragma unroll
    for (int i = 0; i < Layout::per_lane; i += Layout::width) {
      const int first = Layout::expert(i, Layout::lane());
      Vector<int32_t, Layout::width> id{};
      Vector<float, Layout::width> values_here{};
      if (first < num_experts) {
        id = *reinterpret_cast<const Vector<int32_t, Layout::width>*>(ids + first);
        values_here = *reinterpret_cast<const Vector<float, Layout::width>*>(gradient + first);
      }
#pragma unroll
      for (int k = 0; k < Layout::width; ++k) {
        const bool is_chosen = first < num_experts && id.values[k] == first + k;
        values[i + k] = is_chosen ? values_here.values[k] : 0.f;
        mask |= (is_chosen ? 1u : 0u) << (i + k);
      }
    }
  }
  __device__ bool chosen(int i) const { return mask >> i & 1; }
  __device__ float operator[](int i) const { return values[i]; }
};

template <typename Layout>
struct ChosenGradients<Layout, true> {
  const float* gradient;
  const int32_t* ids;
  int num_experts;

  __device__ ChosenGradients(const float* gradient, const int32_t* ids, int num_experts)
      : gradient(gradient), ids(ids), num_experts(num_experts) {}
  __device__ bool chosen(int i) const {
    const int expert = Layout::expert(i, Layout::lane());
    return expert < num_experts && ids[expert] == expert;
  }
  __device__ float operator[](int i) const { return chosen(i) ? gradient[Layout::expert(i, Layout::lane())] : 0.f; }
};

template <typename scalar_t, typename Layout>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    expert_choice_backward_kernel(const float* __restrict__ grad_topk_weights, const scalar_t* __restrict__ logits,
                                  const int32_t* __restrict__ topk_ids, scalar_t* __restrict__ grad_logits,
                                  ExpertChoiceShape shape) {
  const int num_experts = static_cast<int>(shape.num_experts);
  const bool is_softmax = shape.score_function == ScoreFunction::kSoftmax;
  const int64_t token = Layout::first_token(), start = token * num_experts;
  if (token - Layout::row_of_warp() >= shape.num_tokens) return;
  const int experts_here = token < shape.num_tokens ? num_experts : 0;
  const ExpertRow<scalar_t, Layout> row(logits + start, nullptr, experts_here);
  const ChosenGradients<Layout> grads(grad_topk_weights + start, topk_ids + start, experts_here);
  const SoftmaxRow<float> softmax = is_softmax ? softmax_of<Layout>(row) : SoftmaxRow<float>{0.f, 1.f};
  const float scale = divide(1.f, softmax.sum);
  float dot = 0.f;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (is_softmax && grads.chosen(i)) dot += grads[i] * (expf(row.logit(i) - softmax.largest) * scale);
  }
  dot = group_sum<Layout::lanes>(dot);
  store_row<Layout>(grad_logits + start, experts_here, [&](int i) {
    const float logit = row.logit(i);
    if (logit != logit && !grads.chosen(i)) return 0.f;
    const float slope =
        is_softmax ? expf(logit - softmax.largest) * scale : elementwise_score_gradient(shape.score_function, logit);
    return slope * (grads[i] - dot);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> expert_choice_gating(const Tensor& logits, int64_t capacity,
                                                const std::string& score_function) {
  const ExpertChoiceShape shape = check_expert_choice_gating(logits, capacity, score_function);
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const Tensor source = as_contiguous(logits);
  const int64_t num_scores = shape.num_tokens * shape.num_experts;
  Tensor topk_weights = make_tensor(logits, {shape.num_tokens, shape.num_experts}, ScalarType::Float);
  Tensor topk_ids = make_tensor(logits, {shape.num_tokens, shape.num_experts}, ScalarType::Int);
  if (num_scores == 0) return {topk_weights, topk_ids};
  Tensor stats = make_tensor(logits, {shape.num_tokens, 2}, ScalarType::Float);
  Tensor scores = make_tensor(logits, {num_scores}, ScalarType::Float);
  Tensor thresholds = make_tensor(logits, {shape.num_experts, 2}, ScalarType::Int);
  static_assert(sizeof(SoftmaxRow<float>) == 2 * sizeof(float) && sizeof(Threshold) == 2 * sizeof(int32_t));
  auto* stat = reinterpret_cast<SoftmaxRow<float>*>(stats.mutable_data_ptr<float>());
  auto* threshold = reinterpret_cast<Threshold*>(thresholds.mutable_data_ptr<int32_t>());
  const auto tile_blocks = static_cast<unsigned>(
      std::min(ceil_div(shape.num_tokens, kTile) * ceil_div(shape.num_experts, kTile), kMaxBlocks));
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto* logit = source.const_data_ptr<scalar_t>();
    if (shape.capacity == 0) return;
    if (shape.score_function == ScoreFunction::kSoftmax) {
      dispatch_experts(shape.num_experts, rows_are_aligned<scalar_t>(shape.num_experts, {logit}), [&](auto layout) {
        using Layout = decltype(layout);
        launch_kernel(stats_kernel<scalar_t, Layout>, blocks_for_rows<Layout>(shape.num_tokens), kGateThreads, 0,
                      stream, logit, stat, shape);
      });
    }
    launch_kernel(transpose_kernel<scalar_t>, tile_blocks, kTile * kTileRowsPerPass, 0, stream, logit, stat,
                  scores.mutable_data_ptr<float>(), shape);
    const size_t cache_bytes = shape.num_tokens <= kCachedKeys ? cached_key_bytes(shape.num_tokens) : 0;
    launch_kernel(threshold_kernel, static_cast<unsigned>(std::min(shape.num_experts, kMaxBlocks)), kSelectThreads,
                  cache_bytes, stream, scores.const_data_ptr<float>(), threshold, shape);
  });
  launch_kernel(emit_kernel, tile_blocks, kTile * kTileRowsPerPass, 0, stream, scores.const_data_ptr<float>(),
                threshold, topk_weights.mutable_data_ptr<float>(), topk_ids.mutable_data_ptr<int32_t>(), shape);
  return {topk_weights, topk_ids};
}

Tensor expert_choice_gating_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                                     const std::string& score_function) {
  const ExpertChoiceShape shape =
      check_expert_choice_gating_backward(grad_topk_weights, logits, topk_ids, score_function);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor source = as_contiguous(logits), gradient = as_contiguous(grad_topk_weights);
  const Tensor chosen = as_contiguous(topk_ids);
  Tensor grad_logits = make_tensor(logits, {shape.num_tokens, shape.num_experts});
  if (shape.num_tokens == 0) return grad_logits;
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned =
        rows_are_aligned<scalar_t>(shape.num_experts, {source.const_data_ptr()}) &&
        rows_are_aligned<float>(shape.num_experts, {gradient.const_data_ptr(), chosen.const_data_ptr()});
    dispatch_experts(shape.num_experts, aligned, [&](auto layout) {
      using Layout = decltype(layout);
      launch_kernel(expert_choice_backward_kernel<scalar_t, Layout>, blocks_for_rows<Layout>(shape.num_tokens),
                    kGateThreads, 0, current_stream(logits), gradient.const_data_ptr<float>(),
                    source.const_data_ptr<scalar_t>(), chosen.const_data_ptr<int32_t>(),
                    grad_logits.mutable_data_ptr<scalar_t>(), shape);
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("expert_choice_gating", TORCH_BOX(&moe_ext::cuda::expert_choice_gating));
  m.impl("expert_choice_gating_backward", TORCH_BOX(&moe_ext::cuda::expert_choice_gating_backward));
}
