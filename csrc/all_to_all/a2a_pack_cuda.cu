// a2a_pack and its backward on CUDA: rows move by permute and unpermute, the metadata by one thread per entry.
// Traffic: T*H read, S*H written, and per send row K ids and weights read and written. Bound: memory.
#include "a2a_pack.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../common/tensors.h"
#include "../permutation/permute.h"
#include "../permutation/unpermute.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;

template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    pack_entries_kernel(const index_t* __restrict__ topk_ids, const float* __restrict__ topk_weights,
                        const int32_t* __restrict__ rank_expert_offsets, const int32_t* __restrict__ send_offsets,
                        const int32_t* __restrict__ send_to_slot, int32_t* __restrict__ send_ids,
                        float* __restrict__ send_weights, PackShape shape) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < shape.num_rows * shape.topk;
       i += stride) {
    const int64_t row = i / shape.topk;
    const int rank = find_interval(send_offsets, static_cast<int>(shape.num_ranks), row);
    const auto entry = find_entry(token_of_row(send_to_slot[row], shape), rank, i % shape.topk, topk_ids, topk_weights,
                                  rank_expert_offsets, shape);
    send_ids[i] = entry.local_id;
    send_weights[i] = entry.weight;
  }
}

template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    weight_gradients_kernel(const index_t* __restrict__ topk_ids, const int32_t* __restrict__ rank_expert_offsets,
                            const int32_t* __restrict__ send_offsets, const int32_t* __restrict__ slot_to_send,
                            const float* __restrict__ grad_send_weights, float* __restrict__ grad_topk_weights,
                            PackShape shape) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < shape.num_tokens * shape.topk;
       i += stride) {
    grad_topk_weights[i] = weight_gradient(i / shape.topk, i % shape.topk, topk_ids, rank_expert_offsets, send_offsets,
                                           slot_to_send, shape, grad_send_weights);
  }
}

unsigned blocks_for(int64_t entries) {
  return static_cast<unsigned>(std::min(ceil_div(entries, kThreads), kMaxBlocks));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> a2a_pack(const Tensor& hidden, const Tensor& topk_ids, const Tensor& topk_weights,
                                            const Tensor& rank_expert_offsets, const Tensor& send_offsets,
                                            const Tensor& send_to_slot, const Tensor& slot_to_send) {
  const PackShape shape =
      check_a2a_pack(hidden, topk_ids, topk_weights, rank_expert_offsets, send_offsets, send_to_slot, slot_to_send);
  const DeviceGuard guard(hidden.get_device_index());
  Tensor send_hidden = permute(hidden, send_to_slot, slot_to_send, shape.slots);
  const Tensor ids = as_contiguous(topk_ids), weights = as_contiguous(topk_weights);
  const Tensor owners = as_contiguous(rank_expert_offsets), starts = as_contiguous(send_offsets);
  const Tensor slots = as_contiguous(send_to_slot);
  Tensor send_ids = make_tensor(topk_ids, {shape.num_rows, shape.topk}, ScalarType::Int);
  Tensor send_weights = make_tensor(topk_weights, {shape.num_rows, shape.topk});
  if (shape.num_rows == 0) return {send_hidden, send_ids, send_weights};
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    using index_t = typename decltype(tag)::type;
    launch_kernel(pack_entries_kernel<index_t>, blocks_for(shape.num_rows * shape.topk), kThreads, 0,
                  current_stream(hidden), ids.const_data_ptr<index_t>(), weights.const_data_ptr<float>(),
                  owners.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(), slots.const_data_ptr<int32_t>(),
                  send_ids.mutable_data_ptr<int32_t>(), send_weights.mutable_data_ptr<float>(), shape);
  });
  return {send_hidden, send_ids, send_weights};
}

std::tuple<Tensor, Tensor> a2a_pack_backward(const Tensor& grad_send_hidden, const Tensor& grad_send_weights,
                                             const Tensor& topk_ids, const Tensor& rank_expert_offsets,
                                             const Tensor& send_offsets, const Tensor& send_to_slot,
                                             const Tensor& slot_to_send) {
  const PackShape shape = check_a2a_pack_backward(grad_send_hidden, grad_send_weights, topk_ids, rank_expert_offsets,
                                                  send_offsets, send_to_slot, slot_to_send);
  const DeviceGuard guard(grad_send_hidden.get_device_index());
  Tensor grad_hidden = unpermute(grad_send_hidden, send_to_slot, slot_to_send, std::nullopt, shape.slots);
  const Tensor ids = as_contiguous(topk_ids), grads = as_contiguous(grad_send_weights);
  const Tensor owners = as_contiguous(rank_expert_offsets), starts = as_contiguous(send_offsets);
  const Tensor rows = as_contiguous(slot_to_send);
  Tensor grad_weights = make_tensor(grad_send_weights, {shape.num_tokens, shape.topk});
  if (shape.num_tokens == 0) return {grad_hidden, grad_weights};
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
    using index_t = typename decltype(tag)::type;
    launch_kernel(weight_gradients_kernel<index_t>, blocks_for(shape.num_tokens * shape.topk), kThreads, 0,
                  current_stream(grad_send_hidden), ids.const_data_ptr<index_t>(), owners.const_data_ptr<int32_t>(),
                  starts.const_data_ptr<int32_t>(), rows.const_data_ptr<int32_t>(), grads.const_data_ptr<float>(),
                  grad_weights.mutable_data_ptr<float>(), shape);
  });
  return {grad_hidden, grad_weights};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("a2a_pack", TORCH_BOX(&moe_ext::cuda::a2a_pack));
  m.impl("a2a_pack_backward", TORCH_BOX(&moe_ext::cuda::a2a_pack_backward));
}
