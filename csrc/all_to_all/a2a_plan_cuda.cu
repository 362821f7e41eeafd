// a2a_plan on CUDA: a kernel that writes each token's ranks, ascending and distinct, then routing_plan over ranks.
// Mapping: one thread per token, which collects its ranks as bits, kRanksAtOnce ranks at a time, and writes them in
// order. Traffic: 4*K to 8*K bytes of ids read per token, 4*min(K, R) written, then that of routing_plan. Bound:
// latency.
#include "a2a_plan.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../common/tensors.h"
#include "../plan/routing_plan.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRanksAtOnce = 64;

template <typename index_t>
__global__ void __launch_bounds__(kThreads)
    token_ranks_kernel(const index_t* __restrict__ topk_ids, const int32_t* __restrict__ rank_expert_offsets,
                       int32_t* __restrict__ rank_ids, int64_t num_tokens, int topk, int slots, int num_ranks) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; token < num_tokens; token += stride) {
    int32_t* mine = rank_ids + token * slots;
    int found = 0;
    for (int first = 0; first < num_ranks; first += kRanksAtOnce) {
      uint64_t goes = 0;
      for (int j = 0; j < topk; ++j) {
        const int rank = find_interval(rank_expert_offsets, num_ranks, topk_ids[token * topk + j]) - first;
        if (rank >= 0 && rank < kRanksAtOnce) goes |= uint64_t{1} << rank;
      }
      for (; goes != 0; goes &= goes - 1) mine[found++] = first + __ffsll(static_cast<int64_t>(goes)) - 1;
    }
    while (found < slots) mine[found++] = -1;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> a2a_plan(const Tensor& topk_ids, const Tensor& rank_expert_offsets) {
  const int64_t num_ranks = check_a2a_plan(topk_ids, rank_expert_offsets);
  const DeviceGuard guard(topk_ids.get_device_index());
  const int64_t num_tokens = topk_ids.size(0), topk = topk_ids.size(1), slots = slots_per_token(topk, num_ranks);
  const Tensor ids = as_contiguous(topk_ids), owners = as_contiguous(rank_expert_offsets);
  Tensor rank_ids = make_tensor(topk_ids, {num_tokens, slots}, ScalarType::Int);
  if (num_tokens > 0) {
    dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto tag) {
      using index_t = typename decltype(tag)::type;
      launch_kernel(token_ranks_kernel<index_t>,
                    static_cast<unsigned>(std::min(ceil_div(num_tokens, kThreads), kMaxBlocks)), kThreads, 0,
                    current_stream(topk_ids), ids.const_data_ptr<index_t>(), owners.const_data_ptr<int32_t>(),
                    rank_ids.mutable_data_ptr<int32_t>(), num_tokens, static_cast<int>(topk), static_cast<int>(slots),
                    static_cast<int>(num_ranks));
    });
  }
  auto [send_offsets, send_counts, send_to_slot, slot_to_send] =
      routing_plan(rank_ids, num_ranks, std::nullopt, std::nullopt, 1);
  return {send_counts, send_offsets, send_to_slot, slot_to_send};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("a2a_plan", TORCH_BOX(&moe_ext::cuda::a2a_plan));
}
