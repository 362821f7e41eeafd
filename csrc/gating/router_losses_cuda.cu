// router_losses and its backward on CUDA. Floating sums run in a fixed order; the only atomics count integers.
//   count_kernel:    loads and counted tokens, through histograms in shared memory
//   loss_kernel:     a group of lanes per token, as in topk_gating; blocks belong to one sequence, a lane keeps the
//                    loads of its experts and sums load * score and logsumexp^2 over its tokens; the last block adds
//                    the sums of all blocks in order
//   backward:        a group of lanes per token, everything recomputed from its logits
// The losses are no by-product of topk_gating: a balance loss needs all loads before the first score is weighted, and
// the logits, at most tens of megabytes, are still in L2 when loss_kernel reads them.
// Traffic: E logits and K ids read per token; backward: E read, E written. Bound: memory, launches for few tokens.
#include "router_losses.h"

#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "expert_row.h"

namespace moe_ext::cuda {
namespace {

constexpr int kCountThreads = 256;
constexpr int64_t kEntriesPerCountBlock = 4096;
constexpr uint32_t kIdsInFlight = 4;
constexpr int kMaxSharedCounts = 12000;  // above, blocks count in device memory
constexpr int64_t kLossBlocksPerMultiprocessor = 8;

// Blocks that share the sequences out: each sequence has as many, and a block has some sequences where they are many.
struct SequenceBlocks {
  int64_t per_sequence, total;

  // `wanted` for one sequence, at most `limit` in all.
  SequenceBlocks(int64_t wanted, int64_t limit, int64_t num_sequences)
      : per_sequence(std::clamp<int64_t>(limit / num_sequences, 1, std::max<int64_t>(wanted, 1))),
        total(std::min(per_sequence * num_sequences, std::max(limit, per_sequence))) {}
};

// Blocks of a sequence come one after the other. `per_sequence` above 1 leaves each block one sequence.
template <typename index_t>
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const index_t* __restrict__ topk_ids, const bool* __restrict__ token_mask,
                 int32_t* __restrict__ tokens_per_expert, int32_t* __restrict__ num_counted,
                 int32_t* __restrict__ finished_blocks, int64_t per_sequence, LossShape shape) {
  MOE_DYNAMIC_SHARED(int32_t, shared_counts);
  const int num_experts = static_cast<int>(shape.num_experts);
  const bool in_shared = num_experts <= kMaxSharedCounts;
  const int64_t length = shape.sequence_length();
  // 32 bits for all that counts slots: a 64-bit division is a call on the device.
  const auto num_slots = static_cast<uint32_t>(length * shape.topk), topk = static_cast<uint32_t>(shape.topk);
  const auto stride = static_cast<uint32_t>(per_sequence * kCountThreads);
  const auto first = static_cast<uint32_t>(blockIdx.x % per_sequence * kCountThreads + threadIdx.x);
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished_blocks = 0;
  for (int64_t sequence = blockIdx.x / per_sequence; sequence < shape.num_sequences;
       sequence += gridDim.x / per_sequence) {
    int32_t* loads = tokens_per_expert + sequence * num_experts;
    const index_t* ids = topk_ids + sequence * length * shape.topk;
    const bool* mask = token_mask ? token_mask + sequence * length : nullptr;
    if (in_shared) {
      for (int expert = threadIdx.x; expert < num_experts; expert += kCountThreads) shared_counts[expert] = 0;
      __syncthreads();
    }
    for (uint32_t i = first; i < num_slots; i += kIdsInFlight * stride) {
      index_t id[kIdsInFlight];
#pragma unroll
      for (uint32_t k = 0; k < kIdsInFlight; ++k) id[k] = i + k * stride < num_slots ? ids[i + k * stride] : -1;
#pragma unroll
      for (uint32_t k = 0; k < kIdsInFlight; ++k) {
        if (id[k] < 0 || id[k] >= num_experts || (mask && !mask[(i + k * stride) / topk])) continue;
        // Two calls: a choice between two pointers would make both atomics generic ones.
        if (in_shared) {
          atomicAdd(&shared_counts[id[k]], 1);
        } else {
          atomicAdd(&loads[id[k]], 1);
        }
      }
    }
    int counted = !mask && first == 0 ? static_cast<int>(length) : 0;
    for (uint32_t token = first; mask && token < length; token += stride) counted += mask[token];
    // One addition per warp: all of a sequence meet in one word.
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) counted += __shfl_xor_sync(kFullMask, counted, offset);
    if (threadIdx.x % kWarpSize == 0 && counted > 0) atomicAdd(&num_counted[sequence], counted);
    if (!in_shared) continue;
    __syncthreads();
    for (int expert = threadIdx.x; expert < num_experts; expert += kCountThreads) {
      if (shared_counts[expert] > 0) atomicAdd(&loads[expert], shared_counts[expert]);
    }
    __syncthreads();
  }
}

// What the scores of a token are made from; they sum to one over the row.
struct ScoredToken {
  ScoreFunction function;
  float largest, logsumexp;  // unlike in the gate, a NaN logit shows in all of it
  float scale;               // 1 / the sum of the scores before they are divided by it; 0 where that is 0

  __device__ float score(float logit) const {
    if (function == ScoreFunction::kSoftmax) return expf(logit - largest) * scale;
    return scale == 0.f ? 0.f : elementwise_score(function, logit) * scale;
  }
};

template <typename Layout, typename Row>
__device__ ScoredToken score_token(const Row& row, ScoreFunction function) {
  float largest = -INFINITY, sum = 0.f, total = 0.f;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (row.allowed(i)) largest = fmaxf(largest, row.logit(i));  // fmaxf passes over NaN
  }
  largest = group_max<Layout::lanes>(largest);
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (row.allowed(i)) sum += expf(row.logit(i) - largest);
  }
  sum = group_sum<Layout::lanes>(sum);
  if (function != ScoreFunction::kSoftmax) {
#pragma unroll
    for (int i = 0; i < row.count(); ++i) {
      if (row.allowed(i)) total += elementwise_score(function, row.logit(i));
    }
    total = group_sum<Layout::lanes>(total);
  } else {
    total = sum;
  }
  return {function, largest, largest + logf(sum), total == 0.f ? 0.f : divide(1.f, total)};
}

// eta_e n_e of a lane's experts, which times the load factor are the loads: in registers, read again where rows are
// wide.
template <typename Layout>
struct Loads {
  LaneValues<float, Layout::wide ? 1 : Layout::per_lane> values;
  const int32_t* tokens_per_expert;
  const float* expert_weights;
  int num_experts;

  // Those of one sequence.
  __device__ Loads(const int32_t* tokens_per_expert, const float* expert_weights, int num_experts)
      : values(nullptr, 0),
        tokens_per_expert(tokens_per_expert),
        expert_weights(expert_weights),
        num_experts(num_experts) {
    if constexpr (!Layout::wide) {
#pragma unroll
      for (int i = 0; i < Layout::per_lane; ++i) values[i] = read(i);
    }
  }
  __device__ float read(int i) const {
    const int expert = Layout::expert(i, Layout::lane());
    if (expert >= num_experts) return 0.f;
    const float count = static_cast<float>(tokens_per_expert[expert]);
    return expert_weights ? count * expert_weights[expert] : count;
  }
  __device__ float operator[](int i) const {
    if constexpr (Layout::wide) return read(i);
    return values[i];
  }
};

// Sum over the block in a fixed order; thread 0 has it.
__device__ float block_sum(float value) {
  __shared__ float warp_sums[kGateWarps];
  value = group_sum<kWarpSize>(value);
  __syncthreads();  // warp_sums may still be read from the last call
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < kGateWarps; ++w) total += warp_sums[w];
  return total;
}

struct LossSums {
  float balance, squares;
};

// Over all sequences: counted tokens, and the sequences where there is one; at least 1 each. By a warp, for all lanes.
struct Totals {
  float tokens, sequences;
  __device__ Totals(const int32_t* num_counted, int64_t num_sequences) {
    int all = 0, some = 0;
    for (int64_t s = threadIdx.x % kWarpSize; s < num_sequences; s += kWarpSize) {
      all += num_counted[s];
      some += num_counted[s] > 0;
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      all += __shfl_xor_sync(kFullMask, all, offset);
      some += __shfl_xor_sync(kFullMask, some, offset);
    }
    tokens = static_cast<float>(max(all, 1));
    sequences = static_cast<float>(max(some, 1));
  }
};

template <typename scalar_t, typename Layout>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    loss_kernel(const scalar_t* __restrict__ logits, const bool* __restrict__ token_mask,
                const int32_t* __restrict__ tokens_per_expert, const int32_t* __restrict__ num_counted,
                const float* __restrict__ expert_weights, LossSums* partial, int32_t* finished_blocks,
                float* __restrict__ balance_loss, float* __restrict__ z_loss, int64_t per_sequence, LossShape shape) {
  __shared__ bool is_last;
  const int num_experts = static_cast<int>(shape.num_experts);
  const int64_t length = shape.sequence_length();
  LossSums sums{0.f, 0.f};
  for (int64_t sequence = blockIdx.x / per_sequence; sequence < shape.num_sequences;
       sequence += gridDim.x / per_sequence) {
    const Loads<Layout> loads(tokens_per_expert + sequence * num_experts, expert_weights, num_experts);
    float balance = 0.f;
    // A loop over the warps' first tokens, so that the lanes of a warp stay together.
    for (int64_t place = blockIdx.x % per_sequence * Layout::rows_per_block + Layout::row_of_block();
         place - Layout::row_of_warp() < length; place += per_sequence * Layout::rows_per_block) {
      const int64_t token = sequence * length + place;
      const bool counts = place < length && (!token_mask || token_mask[token]);
      const ExpertRow<scalar_t, Layout> row(logits + token * num_experts, nullptr, counts ? num_experts : 0);
      const ScoredToken scored = score_token<Layout>(row, shape.score_function);
      if (!counts) continue;
#pragma unroll
      for (int i = 0; i < row.count(); ++i) {
        if (row.allowed(i)) balance += loads[i] * scored.score(row.logit(i));
      }
      if (Layout::lane() == 0) sums.squares += scored.logsumexp * scored.logsumexp;
    }
    const int counted = num_counted[sequence];
    sums.balance += balance * (shape.load_factor<float>(counted) / static_cast<float>(max(counted, 1)));
  }
  sums = {block_sum(sums.balance), block_sum(sums.squares)};
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sums;
    __threadfence();
    is_last = atomicAdd(finished_blocks, 1) == static_cast<int32_t>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  LossSums all{0.f, 0.f};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kGateThreads) {
    all.balance += __ldcg(&partial[b].balance);
    all.squares += __ldcg(&partial[b].squares);
  }
  all = {block_sum(all.balance), block_sum(all.squares)};
  const Totals totals(num_counted, shape.num_sequences);
  if (threadIdx.x == 0) {
    *balance_loss = all.balance / totals.sequences;
    *z_loss = all.squares / totals.tokens;
  }
}

template <typename scalar_t, typename Layout>
__global__ void __launch_bounds__(kGateThreads, Layout::blocks)
    router_losses_backward_kernel(const float* __restrict__ grad_balance_loss, const float* __restrict__ grad_z_loss,
                                  const scalar_t* __restrict__ logits, const int32_t* __restrict__ tokens_per_expert,
                                  const int32_t* __restrict__ num_counted, const bool* __restrict__ token_mask,
                                  const float* __restrict__ expert_weights, scalar_t* __restrict__ grad_logits,
                                  LossShape shape) {
  const int num_experts = static_cast<int>(shape.num_experts);
  const Totals totals(num_counted, shape.num_sequences);
  const int64_t token = Layout::first_token();
  if (token - Layout::row_of_warp() >= shape.num_tokens) return;
  const bool inside = token < shape.num_tokens, counts = inside && (!token_mask || token_mask[token]);
  const int64_t sequence = inside ? token / shape.sequence_length() : 0;
  const int counted = num_counted[sequence];
  const float load_factor = shape.load_factor<float>(counted), grad_z = *grad_z_loss / totals.tokens;
  const float grad_balance = *grad_balance_loss / (totals.sequences * static_cast<float>(max(counted, 1)));
  const Loads<Layout> loads(tokens_per_expert + sequence * num_experts, expert_weights, num_experts);
  scalar_t* destination = grad_logits + token * num_experts;
  const ExpertRow<scalar_t, Layout> row(logits + token * num_experts, nullptr, counts ? num_experts : 0);
  const ScoredToken scored = score_token<Layout>(row, shape.score_function);
  float mean = 0.f;
#pragma unroll
  for (int i = 0; i < row.count(); ++i) {
    if (row.allowed(i)) mean += load_factor * loads[i] * scored.score(row.logit(i));
  }
  mean = group_sum<Layout::lanes>(mean);
  store_row<Layout>(destination, inside ? num_experts : 0, [&](int i) {
    if (!counts) return 0.f;
    const float logit = row.logit(i);
    float slope = scored.score(logit);
    if (shape.score_function != ScoreFunction::kSoftmax) {
      slope = scored.scale == 0.f ? 0.f : elementwise_score_gradient(shape.score_function, logit) * scored.scale;
    }
    const float probability = expf(logit - scored.logsumexp);
    return grad_balance * slope * (load_factor * loads[i] - mean) + grad_z * 2.f * scored.logsumexp * probability;
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(const Tensor& logits, const Tensor& topk_ids,
                                                         const std::string& score_function,
                                                         const std::optional<Tensor>& token_mask,
                                                         const std::optional<Tensor>& expert_weights,
                                                         const std::string& load, int64_t num_sequences) {
  const LossShape shape =
      check_router_losses(logits, topk_ids, score_function, token_mask, expert_weights, load, num_sequences);
  const DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  const std::optional<Tensor> mask = as_contiguous(token_mask), weights = as_contiguous(expert_weights);
  const bool* counts = mask ? mask->const_data_ptr<bool>() : nullptr;
  Tensor balance_loss = make_tensor(logits, {}, ScalarType::Float);
  Tensor z_loss = make_tensor(logits, {}, ScalarType::Float);
  Tensor tokens_per_expert = torch::stable::new_zeros(logits, {num_sequences, shape.num_experts}, ScalarType::Int);
  Tensor num_counted = torch::stable::new_zeros(logits, {num_sequences}, ScalarType::Int);
  const int64_t length = shape.sequence_length(),
                loss_blocks = kLossBlocksPerMultiprocessor * multiprocessor_count(logits);
  Tensor scratch = make_tensor(logits, {1 + 2 * (loss_blocks + 1)}, ScalarType::Float);
  auto* finished_blocks = reinterpret_cast<int32_t*>(scratch.mutable_data_ptr<float>());
  auto* partial = reinterpret_cast<LossSums*>(scratch.mutable_data_ptr<float>() + 1);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    using index_t = typename decltype(tag)::type;
    const SequenceBlocks blocks(ceil_div(length * shape.topk, kEntriesPerCountBlock), 2 * multiprocessor_count(logits),
                                num_sequences);
    const size_t shared = shape.num_experts <= kMaxSharedCounts ? shape.num_experts * sizeof(int32_t) : 0;
    launch_kernel(count_kernel<index_t>, static_cast<unsigned>(blocks.total), kCountThreads, shared, stream,
                  ids.const_data_ptr<index_t>(), counts, tokens_per_expert.mutable_data_ptr<int32_t>(),
                  num_counted.mutable_data_ptr<int32_t>(), finished_blocks, blocks.per_sequence, shape);
  });
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned = rows_are_aligned<scalar_t>(shape.num_experts, {source.const_data_ptr()});
    dispatch_experts(shape.num_experts, aligned, [&](auto layout) {
      using Layout = decltype(layout);
      const SequenceBlocks blocks(ceil_div(length, Layout::rows_per_block), loss_blocks, num_sequences);
      launch_kernel(loss_kernel<scalar_t, Layout>, static_cast<unsigned>(blocks.total), kGateThreads, 0, stream,
                    source.const_data_ptr<scalar_t>(), counts, tokens_per_expert.const_data_ptr<int32_t>(),
                    num_counted.const_data_ptr<int32_t>(), weights ? weights->const_data_ptr<float>() : nullptr,
                    partial, finished_blocks, balance_loss.mutable_data_ptr<float>(), z_loss.mutable_data_ptr<float>(),
                    blocks.per_sequence, shape);
    });
  });
  return {balance_loss, z_loss, tokens_per_expert, num_counted};
}

Tensor router_losses_backward(const Tensor& grad_balance_loss, const Tensor& grad_z_loss, const Tensor& logits,
                              const Tensor& tokens_per_expert, const Tensor& num_counted,
                              const std::string& score_function, const std::optional<Tensor>& token_mask,
                              const std::optional<Tensor>& expert_weights, const std::string& load, int64_t topk) {
  const LossShape shape =
      check_router_losses_backward(grad_balance_loss, grad_z_loss, logits, tokens_per_expert, num_counted,
                                   score_function, token_mask, expert_weights, load, topk);
  const DeviceGuard guard(logits.get_device_index());
  const Tensor source = as_contiguous(logits), loads = as_contiguous(tokens_per_expert);
  const Tensor counted = as_contiguous(num_counted);
  const std::optional<Tensor> mask = as_contiguous(token_mask), weights = as_contiguous(expert_weights);
  Tensor grad_logits = make_tensor(logits, {shape.num_tokens, shape.num_experts});
  if (shape.num_tokens == 0) return grad_logits;
  dispatch_floating_cuda(logits.scalar_type(), "logits", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const bool aligned =
        rows_are_aligned<scalar_t>(shape.num_experts, {source.const_data_ptr(), grad_logits.const_data_ptr()});
    dispatch_experts(shape.num_experts, aligned, [&](auto layout) {
      using Layout = decltype(layout);
      launch_kernel(router_losses_backward_kernel<scalar_t, Layout>, blocks_for_rows<Layout>(shape.num_tokens),
                    kGateThreads, 0, current_stream(logits), grad_balance_loss.const_data_ptr<float>(),
                    grad_z_loss.const_data_ptr<float>(), source.const_data_ptr<scalar_t>(),
                    loads.const_data_ptr<int32_t>(), counted.const_data_ptr<int32_t>(),
                    mask ? mask->const_data_ptr<bool>() : nullptr, weights ? weights->const_data_ptr<float>() : nullptr,
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
