// Low-rank experts on CUDA. Sums run in a fixed order, in fp32: deterministic, no atomics.
//
// token_kernel: projection and output; the backward runs it on (grad_output, up, down).
//   Mapping: one block of kTokenThreads per token, whose components' rows are worked out once, into shared memory. A
//     thread reads its 16-byte vectors of x once for kRowsAtOnce rows of `down`; the partial dot products are reduced
//     by shuffles, then over the warps in shared memory, where the token's components stay for the second half: each
//     thread sums its vectors of the chosen rows of `up`, kRowsAtOnce in flight.
//   Traffic: T * (H + O) elements of device memory and, once for all tokens, the weights; T * K * r * (H + O) elements
//     of L2. Bound: L2.
// weight_grad_kernel: the gradient of the router weights from both projections, one thread per slot.
// expert_kernel: the gradient of `down` (or `up`) from rows of a plan.
//   Mapping: one block of kExpertWarps per expert, kComponents ranks and 32 vectors of columns. A warp takes every
//     kExpertWarps-th batch of 32 plan rows, its lanes hold their slots and factors, kRowsAtOnce rows are in flight;
//     the warps' sums are added in order.
//   Traffic: T * K * H elements per kComponents ranks, from L2 where x fits. Bound: L2.
#include "low_rank_experts.h"

#include <torch/csrc/stable/library.h>

#include "../common/block_select.h"
#include "../common/row_access.h"
#include "../common/tensors.h"

namespace moe_ext::cuda {
namespace {

constexpr int kTokenThreads = 128;
constexpr int kTokenWarps = kTokenThreads / kWarpSize;
constexpr int kRowsAtOnce = 4;
constexpr int kExpertWarps = 8;
// Blocks that a multiprocessor holds: with more of them the kernels would spill.
constexpr int kTokenBlocks = 8, kExpertBlocks = 2;
// Any kernel gets 48 KiB of shared memory; token_kernel has some of its own beside the components.
constexpr size_t kUnaskedSharedBytes = 47 * 1024;

template <typename index_t>
struct Chosen {
  const index_t* ids;
  const float* weights;
  int64_t num_experts;
  int rank, topk;  // at most kMostComponents together
};

// kRowsAtOnce components of a token, in shared memory: the rows of weights that they stand for, -1 for an id outside
// [0, num_experts) and past the last component; the weights of their slots, later times the dot products.
struct Components {
  Vector<int32_t, kRowsAtOnce> rows;
  Vector<float, kRowsAtOnce> factors;
};

template <typename index_t>
__device__ void store_components(const Chosen<index_t>& chosen, int64_t token, int groups, Components* components) {
#pragma unroll 1
  for (int q = threadIdx.x; q < groups * kRowsAtOnce; q += kTokenThreads) {
    const int slot = q / chosen.rank;
    const int64_t id = slot < chosen.topk ? chosen.ids[token * chosen.topk + slot] : -1;
    const bool held = id >= 0 && id < chosen.num_experts;
    Components& group = components[q / kRowsAtOnce];
    group.rows.values[q % kRowsAtOnce] = held ? static_cast<int32_t>(id * chosen.rank) + q - slot * chosen.rank : -1;
    group.factors.values[q % kRowsAtOnce] = held ? chosen.weights[token * chosen.topk + slot] : 0.f;
  }
}

// source[place], or zeros. In words, else every element would have an instruction of its own choose between the two.
template <typename Packed>
__device__ Packed load_or_zero(const Packed* source, int64_t place, bool held) {
  using Word = std::conditional_t<sizeof(Packed) % sizeof(uint32_t) == 0, uint32_t, uint16_t>;
  using Words = Vector<Word, sizeof(Packed) / sizeof(Word)>;
  Words words{};
  if (held) words = reinterpret_cast<const Words*>(source)[place];
  Packed values;
  memcpy(&values, &words, sizeof(values));
  return values;
}

// weight[rows[r]][column] as one vector each, zeros for a negative row.
template <typename Packed>
__device__ void load_chosen(const Packed* weight, const Vector<int32_t, kRowsAtOnce>& rows, int64_t row_vectors,
                            int64_t column, Packed (&values)[kRowsAtOnce]) {
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    values[r] = load_or_zero(weight, rows.values[r] * row_vectors + column, rows.values[r] >= 0);
  }
}

template <typename scalar_t, int in_width, int out_width, typename index_t>
__global__ void __launch_bounds__(kTokenThreads, kTokenBlocks)
    token_kernel(const scalar_t* __restrict__ input, const scalar_t* __restrict__ down, const scalar_t* __restrict__ up,
                 Chosen<index_t> chosen, float* __restrict__ projection, scalar_t* __restrict__ output,
                 int64_t num_tokens, int64_t in_vectors, int64_t out_vectors) {
  using In = Vector<scalar_t, in_width>;
  using Out = Vector<scalar_t, out_width>;
  MOE_DYNAMIC_SHARED(Components, components);  // [groups]
  __shared__ float partial[kTokenWarps][kRowsAtOnce];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_components = chosen.topk * chosen.rank;
  const int groups = static_cast<int>(ceil_div(num_components, kRowsAtOnce));
  for (int64_t token = blockIdx.x; token < num_tokens; token += gridDim.x) {
    store_components(chosen, token, groups, components);
    __syncthreads();
    const auto* x = reinterpret_cast<const In*>(input) + token * in_vectors;
    for (int group = 0; group < groups; ++group) {
      const Vector<int32_t, kRowsAtOnce> rows = components[group].rows;
      float sums[kRowsAtOnce] = {};
      for (int64_t column = threadIdx.x; column < in_vectors; column += kTokenThreads) {
        const In mine = x[column];
        In values[kRowsAtOnce];
        load_chosen(reinterpret_cast<const In*>(down), rows, in_vectors, column, values);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
          for (int i = 0; i < in_width; ++i) {
            sums[r] += static_cast<float>(mine.values[i]) * static_cast<float>(values[r].values[i]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
          sums[r] += __shfl_xor_sync(kFullMask, sums[r], offset);
        }
        if (lane == 0) partial[warp][r] = sums[r];
      }
      __syncthreads();
      if (const int component = group * kRowsAtOnce + static_cast<int>(threadIdx.x);
          threadIdx.x < kRowsAtOnce && component < num_components) {
        float dot = 0.f;
#pragma unroll
        for (int w = 0; w < kTokenWarps; ++w) dot += partial[w][threadIdx.x];
        const bool held = components[group].rows.values[threadIdx.x] >= 0;
        float& factor = components[group].factors.values[threadIdx.x];
        projection[token * num_components + component] = held ? dot : 0.f;
        factor = held ? dot * factor : 0.f;
      }
      __syncthreads();
    }
    auto* destination = reinterpret_cast<Out*>(output) + token * out_vectors;
    for (int64_t column = threadIdx.x; column < out_vectors; column += kTokenThreads) {
      float sums[out_width] = {};
      for (int group = 0; group < groups; ++group) {
        const Components mine = components[group];
        Out values[kRowsAtOnce];
        load_chosen(reinterpret_cast<const Out*>(up), mine.rows, out_vectors, column, values);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
          for (int i = 0; i < out_width; ++i) {
            sums[i] += mine.factors.values[r] * static_cast<float>(values[r].values[i]);
          }
        }
      }
      Out rounded;
#pragma unroll
      for (int i = 0; i < out_width; ++i) rounded.values[i] = static_cast<scalar_t>(sums[i]);
      destination[column] = rounded;
    }
    __syncthreads();  // the components are read until here
  }
}

__global__ void weight_grad_kernel(const float* __restrict__ forth, const float* __restrict__ back,
                                   float* __restrict__ grad_weights, int64_t num_slots, int64_t rank) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; slot < num_slots; slot += stride) {
    float sum = 0.f;
    for (int64_t q = slot * rank; q < (slot + 1) * rank; ++q) sum += forth[q] * back[q];
    grad_weights[slot] = sum;
  }
}

struct PlanRows {
  const int32_t* expert_offsets;
  const int32_t* permuted_to_slot;
  int64_t num_rows, num_slots;
  int topk, rank;
};

template <int components, typename scalar_t, int width>
__global__ void __launch_bounds__(kExpertWarps* kWarpSize, kExpertBlocks)
    expert_kernel(const scalar_t* __restrict__ rows, const float* __restrict__ weights,
                  const float* __restrict__ factors, PlanRows plan, scalar_t* __restrict__ grad_weight,
                  int64_t row_vectors, int component_groups) {
  using Packed = Vector<scalar_t, width>;
  __shared__ float partial[kExpertWarps][kWarpSize * width];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int block = static_cast<int>(blockIdx.x);
  const int64_t expert = block / component_groups;
  const int first_rank = block % component_groups * components;
  const int64_t begin =
      min(max(static_cast<int64_t>(plan.expert_offsets[expert]), static_cast<int64_t>(0)), plan.num_rows);
  const int64_t end = min(static_cast<int64_t>(plan.expert_offsets[expert + 1]), plan.num_rows);
  for (int64_t segment = blockIdx.y; segment * kWarpSize < row_vectors; segment += gridDim.y) {
    const int64_t column = segment * kWarpSize + lane;
    float sums[components][width] = {};
    for (int64_t batch = begin + warp * kWarpSize; batch < end; batch += kExpertWarps * kWarpSize) {
      int32_t lane_token = -1;
      float lane_factor[components] = {};
      if (batch + lane < end) {
        const int32_t slot = plan.permuted_to_slot[batch + lane];
        if (slot >= 0 && slot < plan.num_slots) {
          lane_token = slot / plan.topk;
#pragma unroll
          for (int i = 0; i < components; ++i) {
            if (first_rank + i < plan.rank) {
              lane_factor[i] = weights[slot] * factors[static_cast<int64_t>(slot) * plan.rank + first_rank + i];
            }
          }
        }
      }
      const int in_batch = static_cast<int>(min(end - batch, static_cast<int64_t>(kWarpSize)));
      for (int first = 0; first < in_batch; first += kRowsAtOnce) {
        Packed values[kRowsAtOnce];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          const int32_t token = __shfl_sync(kFullMask, lane_token, first + r);
          values[r] = Packed{};
          if (token >= 0 && column < row_vectors) {
            values[r] = reinterpret_cast<const Packed*>(rows)[token * row_vectors + column];
          }
        }
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
          for (int i = 0; i < components; ++i) {
            const float factor = __shfl_sync(kFullMask, lane_factor[i], first + r);
#pragma unroll
            for (int v = 0; v < width; ++v) sums[i][v] += factor * static_cast<float>(values[r].values[v]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < components; ++i) {
      __syncthreads();  // partial may still be read
#pragma unroll
      for (int v = 0; v < width; ++v) partial[warp][v * kWarpSize + lane] = sums[i][v];
      __syncthreads();
      if (warp != 0 || column >= row_vectors || first_rank + i >= plan.rank) continue;
      Packed rounded;
#pragma unroll
      for (int v = 0; v < width; ++v) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kExpertWarps; ++w) sum += partial[w][v * kWarpSize + lane];
        rounded.values[v] = static_cast<scalar_t>(sum);
      }
      const int64_t row = expert * plan.rank + first_rank + i;
      reinterpret_cast<Packed*>(grad_weight)[row * row_vectors + column] = rounded;
    }
  }
}

// body(std::integral_constant<int, width>) with the widest vector that rows of this length and these pointers allow.
template <typename scalar_t, typename Body>
void with_width(int64_t row_length, std::initializer_list<const void*> pointers, const Body& body) {
  if (rows_are_vectorizable<scalar_t>(row_length, pointers)) {
    body(std::integral_constant<int, full_width<scalar_t>()>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

// All tensors contiguous.
template <typename scalar_t>
void launch_tokens(const LowRankShape& shape, const Tensor& input, const Tensor& down, const Tensor& up,
                   const Tensor& ids, const Tensor& weights, const Tensor& projection, const Tensor& output) {
  if (shape.num_tokens == 0) return;
  const auto* x = input.const_data_ptr<scalar_t>();
  const auto* from = down.const_data_ptr<scalar_t>();
  const auto* to = up.const_data_ptr<scalar_t>();
  auto* sums = output.mutable_data_ptr<scalar_t>();
  // Always the same limit: another thread may be launching the kernel with other numbers.
  constexpr size_t kMostSharedBytes = ceil_div(kMostComponents, kRowsAtOnce) * sizeof(Components);
  const size_t shared_bytes = ceil_div(shape.components(), kRowsAtOnce) * sizeof(Components);
  dispatch_index(ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    using index_t = typename decltype(index_tag)::type;
    const Chosen<index_t> chosen = {ids.const_data_ptr<index_t>(), weights.const_data_ptr<float>(), shape.num_experts,
                                    static_cast<int>(shape.rank), static_cast<int>(shape.topk)};
    with_width<scalar_t>(shape.in_features, {x, from}, [&](auto in_width) {
      with_width<scalar_t>(shape.out_features, {to, sums}, [&](auto out_width) {
        const auto blocks = static_cast<unsigned>(std::min(shape.num_tokens, kMaxBlocks));
        const auto kernel = token_kernel<scalar_t, in_width.value, out_width.value, index_t>;
        if (shared_bytes > kUnaskedSharedBytes) allow_shared_bytes(kernel, kMostSharedBytes);
        launch_kernel(kernel, dim3(blocks), kTokenThreads, shared_bytes, current_stream(input), x, from, to, chosen,
                      projection.mutable_data_ptr<float>(), sums, shape.num_tokens, shape.in_features / in_width.value,
                      shape.out_features / out_width.value);
      });
    });
  });
}

template <typename scalar_t>
void launch_experts(const LowRankShape& shape, const Tensor& rows, const Tensor& weights, const Tensor& factors,
                    const Tensor& offsets, const Tensor& slots, const Tensor& grad_weight) {
  const int64_t row_length = rows.size(1);
  if (row_length == 0) return;
  const PlanRows plan = {
      offsets.const_data_ptr<int32_t>(), slots.const_data_ptr<int32_t>(), slots.numel(),
      shape.num_tokens * shape.topk,     static_cast<int>(shape.topk),    static_cast<int>(shape.rank)};
  const auto* source = rows.const_data_ptr<scalar_t>();
  auto* sums = grad_weight.mutable_data_ptr<scalar_t>();
  const auto launch = [&](auto components, auto width) {
    const int64_t groups = ceil_div(shape.rank, components.value), row_vectors = row_length / width.value;
    const dim3 grid(static_cast<unsigned>(shape.num_experts * groups),
                    static_cast<unsigned>(std::min<int64_t>(ceil_div(row_vectors, kWarpSize), 65535)));
    launch_kernel(expert_kernel<components.value, scalar_t, width.value>, grid, kExpertWarps * kWarpSize, 0,
                  current_stream(rows), source, weights.const_data_ptr<float>(), factors.const_data_ptr<float>(), plan,
                  sums, row_vectors, static_cast<int>(groups));
  };
  with_width<scalar_t>(row_length, {source, sums}, [&](auto width) {
    if (shape.rank == 1) {
      launch(std::integral_constant<int, 1>{}, width);
    } else {
      launch(std::integral_constant<int, 4>{}, width);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_experts(const Tensor& input, const Tensor& lora_a, const Tensor& lora_b,
                                            const Tensor& topk_ids, const Tensor& topk_weights) {
  const LowRankShape shape = check_low_rank_experts(input, lora_a, lora_b, topk_ids, topk_weights);
  const DeviceGuard guard(input.get_device_index());
  const Tensor rows = as_contiguous(input), ids = as_contiguous(topk_ids);
  const Tensor down = as_contiguous(lora_a), up = as_contiguous(lora_b);
  const Tensor weights = as_contiguous(topk_weights);
  const Tensor output = make_tensor(input, {shape.num_tokens, shape.out_features});
  const Tensor projection = make_tensor(topk_weights, {shape.num_tokens, shape.components()});
  dispatch_floating_cuda(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    launch_tokens<scalar_t>(shape, rows, down, up, ids, weights, projection, output);
  });
  return {output, projection};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_experts_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& lora_a, const Tensor& lora_b, const Tensor& topk_ids,
    const Tensor& topk_weights, const Tensor& projection, const Tensor& expert_offsets, const Tensor& permuted_to_slot,
    std::vector<bool> output_mask) {
  const LowRankShape shape = check_low_rank_experts_backward(grad_output, input, lora_a, lora_b, topk_ids, topk_weights,
                                                             projection, expert_offsets, permuted_to_slot);
  const LowRankGradientMask wanted = check_low_rank_output_mask(output_mask);
  const DeviceGuard guard(input.get_device_index());
  const Tensor gradient = as_contiguous(grad_output), rows = as_contiguous(input);
  const Tensor down = as_contiguous(lora_a), up = as_contiguous(lora_b);
  const Tensor ids = as_contiguous(topk_ids), weights = as_contiguous(topk_weights);
  const Tensor forth = as_contiguous(projection);
  const Tensor offsets = as_contiguous(expert_offsets);
  const Tensor slots = as_contiguous(permuted_to_slot);
  const LowRankGradients grads = new_low_rank_gradients(shape, wanted, input, topk_weights);
  dispatch_floating_cuda(input.scalar_type(), "input", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    if (wanted.back()) {
      // Without grad_input its rows have no columns.
      const int64_t columns = wanted.input ? shape.in_features : 0;
      const LowRankShape back = {shape.num_tokens,  shape.out_features, columns,
                                 shape.num_experts, shape.rank,         shape.topk};
      launch_tokens<scalar_t>(back, gradient, up, down, ids, weights, grads.back, grads.input);
    }
    if (wanted.lora_a) launch_experts<scalar_t>(shape, rows, weights, grads.back, offsets, slots, grads.lora_a);
    if (wanted.lora_b) launch_experts<scalar_t>(shape, gradient, weights, forth, offsets, slots, grads.lora_b);
  });
  if (const int64_t num_slots = wanted.topk_weights ? shape.num_tokens * shape.topk : 0; num_slots > 0) {
    constexpr int kThreads = 256;
    const auto blocks = static_cast<unsigned>(std::min(ceil_div(num_slots, kThreads), kMaxBlocks));
    launch_kernel(weight_grad_kernel, dim3(blocks), kThreads, 0, current_stream(input), forth.const_data_ptr<float>(),
                  grads.back.const_data_ptr<float>(), grads.topk_weights.mutable_data_ptr<float>(), num_slots,
                  shape.rank);
  }
  return {grads.input, grads.lora_a, grads.lora_b, grads.topk_weights};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("low_rank_experts", TORCH_BOX(&moe_ext::cuda::low_rank_experts));
  m.impl("low_rank_experts_backward", TORCH_BOX(&moe_ext::cuda::low_rank_experts_backward));
}
