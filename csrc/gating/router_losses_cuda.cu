// router_losses and its backward on CUDA. Floating sums run in a fixed order; the only atomics count integers.
// Mapping: one warp per token, its logits in registers (above 1024 experts: read again at every use, the warp's sums in
//   a workspace row).
//   partial_kernel: a block sums the scores and squared logsumexps of its tokens into one row of partial sums
//   finish_kernel:  one block adds the partial rows in order and multiplies with the loads
//   backward:       one warp per token, everything recomputed from its logits
// Traffic: E logits and K ids read per token, 4*E bytes per block of partial sums; backward: E read, E written.
// Bound: memory.
#include "router_losses.h"

#include <torch/csrc/stable/library.h>

#include "../common/optional_tensor.h"
#include "warp_row.h"

namespace moe_ext::cuda {
namespace {

constexpr int64_t kMaxPartialBlocks = 256;
constexpr int64_t kTokensPerBlock = 16;

// What the scores of a token are made from; they sum to one over the row.
struct ScoredToken {
  ScoreFunction function;
  SoftmaxRow<float> softmax;  // unlike in the gate, a NaN logit shows in all of it
  float logsumexp, total;     // total: the sum of the scores before they are divided by it

  __device__ float score(float logit) const {
    if (function == ScoreFunction::kSoftmax) return softmax.probability(logit);
    return total == 0.f ? 0.f : elementwise_score(function, logit) / total;
  }
};

template <typename Row>
__device__ ScoredToken score_token(const Row& row, ScoreFunction function) {
  float largest = -INFINITY, sum = 0.f, total = 0.f;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (row.allowed(i) && row.logit(i) > largest) largest = row.logit(i);
  }
  largest = warp_max(largest);
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (!row.allowed(i)) continue;
    sum += expf(row.logit(i) - largest);
    if (function != ScoreFunction::kSoftmax) total += elementwise_score(function, row.logit(i));
  }
  sum = warp_sum(sum);
  return {function, {largest, sum}, largest + logf(sum), function == ScoreFunction::kSoftmax ? 1.f : warp_sum(total)};
}

// partial: [blocks, E + 1]; the last column holds the squared logsumexps.
template <typename scalar_t, typename index_t, int per_lane>
__global__ void __launch_bounds__(kGateThreads)
    partial_kernel(const scalar_t* __restrict__ logits, const index_t* __restrict__ topk_ids,
                   const bool* __restrict__ token_mask, float* __restrict__ workspace, float* __restrict__ partial,
                   int32_t* __restrict__ tokens_per_expert, int32_t* __restrict__ num_counted, int64_t workspace_stride,
                   LossShape shape) {
  MOE_DYNAMIC_SHARED(float, shared_sums);  // [E + 1], where the row fits in registers
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_experts = static_cast<int>(shape.num_experts);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kGateWarps + warp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGateWarps;
  float* block_partial = partial + static_cast<int64_t>(blockIdx.x) * (num_experts + 1);
  float* block_sums = per_lane > 0 ? shared_sums : block_partial;
  const int count = per_lane > 0 ? per_lane : (num_experts + kWarpSize - 1) / kWarpSize;
  LaneValues<float, per_lane> sums(workspace + first_token * workspace_stride, lane);
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = 0.f;
  float squares = 0.f;
  int counted = 0;
  for (int64_t token = first_token; token < shape.num_tokens; token += stride) {
    if (token_mask && !token_mask[token]) continue;
    ++counted;
    const WarpRow<scalar_t, per_lane> row(logits + token * num_experts, nullptr, num_experts, lane);
    const ScoredToken scored = score_token(row, shape.score_function);
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      if (row.allowed(i)) sums[i] += scored.score(row.logit(i));
    }
    squares += scored.logsumexp * scored.logsumexp;
    for (int64_t j = lane; j < shape.topk; j += kWarpSize) {
      const index_t id = topk_ids[token * shape.topk + j];
      if (id >= 0 && id < num_experts) atomicAdd(&tokens_per_expert[id], 1);
    }
  }
  if (lane == 0 && counted > 0) atomicAdd(num_counted, counted);
  for (int w = 0; w < kGateWarps; ++w) {
    if (warp == w) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int expert = lane + i * kWarpSize;
        if (expert < num_experts) block_sums[expert] = (w == 0 ? 0.f : block_sums[expert]) + sums[i];
      }
      if (lane == 0) block_sums[num_experts] = (w == 0 ? 0.f : block_sums[num_experts]) + squares;
    }
    __syncthreads();
  }
  if constexpr (per_lane > 0) {
    for (int i = threadIdx.x; i <= num_experts; i += kGateThreads) block_partial[i] = block_sums[i];
  }
}

__global__ void __launch_bounds__(kGateThreads)
    finish_kernel(const float* __restrict__ partial, int num_blocks, const int32_t* __restrict__ tokens_per_expert,
                  const int32_t* __restrict__ num_counted, float* __restrict__ balance_loss, float* __restrict__ z_loss,
                  LossShape shape) {
  __shared__ float warp_totals[kGateWarps];
  const int num_experts = static_cast<int>(shape.num_experts);
  const float tokens = static_cast<float>(max(*num_counted, 1));
  float balance = 0.f;
  for (int column = threadIdx.x; column <= num_experts; column += kGateThreads) {
    float sum = 0.f;
#pragma unroll 8
    for (int b = 0; b < num_blocks; ++b) sum += partial[static_cast<int64_t>(b) * (num_experts + 1) + column];
    if (column < num_experts) {
      balance += static_cast<float>(tokens_per_expert[column]) * sum;
    } else {
      *z_loss = sum / tokens;
    }
  }
  balance = warp_sum(balance);
  if (threadIdx.x % kWarpSize == 0) warp_totals[threadIdx.x / kWarpSize] = balance;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < kGateWarps; ++w) total += warp_totals[w];
    *balance_loss = total * static_cast<float>(num_experts) / (static_cast<float>(shape.topk) * tokens * tokens);
  }
}

template <typename scalar_t, int per_lane>
__global__ void __launch_bounds__(kGateThreads)
    router_losses_backward_kernel(const float* __restrict__ grad_balance_loss, const float* __restrict__ grad_z_loss,
                                  const scalar_t* __restrict__ logits, const int32_t* __restrict__ tokens_per_expert,
                                  const int32_t* __restrict__ num_counted, const bool* __restrict__ token_mask,
                                  scalar_t* __restrict__ grad_logits, LossShape shape) {
  const int lane = threadIdx.x % kWarpSize, num_experts = static_cast<int>(shape.num_experts);
  const float tokens = static_cast<float>(max(*num_counted, 1));
  const float grad_balance = *grad_balance_loss / tokens, grad_z = *grad_z_loss / tokens;
  const float load_factor = static_cast<float>(num_experts) / (static_cast<float>(shape.topk) * tokens);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGateWarps;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kGateWarps + threadIdx.x / kWarpSize;
       token < shape.num_tokens; token += stride) {
    scalar_t* destination = grad_logits + token * num_experts;
    if (token_mask && !token_mask[token]) {
      for (int expert = lane; expert < num_experts; expert += kWarpSize)
        destination[expert] = static_cast<scalar_t>(0.f);
      continue;
    }
    const WarpRow<scalar_t, per_lane> row(logits + token * num_experts, nullptr, num_experts, lane);
    const ScoredToken scored = score_token(row, shape.score_function);
    float mean = 0.f;
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      const int expert = lane + i * kWarpSize;
      if (expert >= num_experts) continue;
      mean += load_factor * static_cast<float>(tokens_per_expert[expert]) * scored.score(row.logit(i));
    }
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      const int expert = lane + i * kWarpSize;
      if (expert >= num_experts) continue;
      const float logit = row.logit(i);
      float slope = scored.score(logit);
      if (shape.score_function != ScoreFunction::kSoftmax) {
        slope = scored.total == 0.f ? 0.f : elementwise_score_gradient(shape.score_function, logit) / scored.total;
      }
      const float load = load_factor * static_cast<float>(tokens_per_expert[expert]);
      const float probability = expf(logit - scored.logsumexp);
      destination[expert] =
          static_cast<scalar_t>(grad_balance * slope * (load - mean) + grad_z * 2.f * scored.logsumexp * probability);
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(const Tensor& logits, const Tensor& topk_ids,
                                                         const std::string& score_function,
                                                         const std::optional<Tensor>& token_mask) {
  const LossShape shape = check_router_losses(logits, topk_ids, score_function, token_mask);
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const Tensor source = torch::stable::contiguous(logits), ids = torch::stable::contiguous(topk_ids);
  const std::optional<Tensor> mask = contiguous_if_any(token_mask);
  Tensor balance_loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor z_loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor tokens_per_expert = torch::stable::new_zeros(logits, {shape.num_experts}, ScalarType::Int);
  Tensor num_counted = torch::stable::new_zeros(logits, {}, ScalarType::Int);
  const int64_t num_blocks = std::clamp<int64_t>(ceil_div(shape.num_tokens, kTokensPerBlock), 1, kMaxPartialBlocks);
  Tensor partial = torch::stable::new_empty(logits, {num_blocks, shape.num_experts + 1}, ScalarType::Float);
  const bool wide = shape.num_experts > kMaxRegisterExperts;
  const int64_t workspace_stride = wide ? workspace_row(shape.num_experts) : 0;
  const size_t shared_bytes = wide ? 0 : (shape.num_experts + 1) * sizeof(float);
  Tensor workspace = torch::stable::new_empty(logits, {num_blocks * kGateWarps * workspace_stride}, ScalarType::Float);
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
      using index_t = typename decltype(index_tag)::type;
      dispatch_experts(shape.num_experts, [&](auto per_lane) {
        launch_kernel(partial_kernel<scalar_t, index_t, decltype(per_lane)::value>, static_cast<unsigned>(num_blocks),
                      kGateThreads, shared_bytes, stream, source.const_data_ptr<scalar_t>(),
                      ids.const_data_ptr<index_t>(), mask ? mask->const_data_ptr<bool>() : nullptr,
                      workspace.mutable_data_ptr<float>(), partial.mutable_data_ptr<float>(),
                      tokens_per_expert.mutable_data_ptr<int32_t>(), num_counted.mutable_data_ptr<int32_t>(),
                      workspace_stride, shape);
      });
    });
  });
  launch_kernel(finish_kernel, 1, kGateThreads, 0, stream, partial.const_data_ptr<float>(),
                static_cast<int>(num_blocks), tokens_per_expert.const_data_ptr<int32_t>(),
                num_counted.const_data_ptr<int32_t>(), balance_loss.mutable_data_ptr<float>(),
                z_loss.mutable_data_ptr<float>(), shape);
  return {balance_loss, z_loss, tokens_per_expert, num_counted};
}

Tensor router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss, const Tensor& logits,
                              const Tensor& tokens_per_expert, const Tensor& num_counted,
                              const std::string& score_function, const std::optional<Tensor>& token_mask,
                              int64_t topk) {
  const LossShape shape = check_router_losses_backward(grad_balance_loss, grad_z_loss, logits, tokens_per_expert,
                                                       num_counted, score_function, token_mask, topk);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor source = torch::stable::contiguous(logits), loads = torch::stable::contiguous(tokens_per_expert);
  const std::optional<Tensor> mask = contiguous_if_any(token_mask);
  Tensor grad_logits = torch::stable::new_empty(logits, {shape.num_tokens, shape.num_experts});
  if (shape.num_tokens == 0) return grad_logits;
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    dispatch_experts(shape.num_experts, [&](auto per_lane) {
      launch_kernel(router_losses_backward_kernel<scalar_t, decltype(per_lane)::value>,
                    blocks_for_rows(shape.num_tokens), kGateThreads, 0, current_stream(logits),
                    grad_balance_loss.const_data_ptr<float>(), grad_z_loss.const_data_ptr<float>(),
                    source.const_data_ptr<scalar_t>(), loads.const_data_ptr<int32_t>(),
                    num_counted.const_data_ptr<int32_t>(), mask ? mask->const_data_ptr<bool>() : nullptr,
                    grad_logits.mutable_data_ptr<scalar_t>(), shape);
    });
  });
  return grad_logits;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("router_losses", TORCH_BOX(&moe_ext::cuda::router_losses));
  m.impl("router_losses_backward", TORCH_BOX(&moe_ext::cuda::router_losses_backward));
}
