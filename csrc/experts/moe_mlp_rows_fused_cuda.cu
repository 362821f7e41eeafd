// The row-wise half of moe_mlp's backward inside the product that gives dA' (grouped_gemm/fused_gemm.h), and the sum of
// the partial dot products that it leaves.
//
// sum kernel
//   Mapping: one warp per row; its lanes take the partial sums, then the columns of dO and down_bias, in a fixed order.
//   Traffic per row: 4 * I / 128 bytes read and 4 written; with a bias another 2H elements, mostly from L2.
//   Bound: device memory.
#include "moe_mlp_rows.h"

#include "../common/tensors.h"
#include "../grouped_gemm/groups.h"
#include "../grouped_gemm/launch_arguments.h"
#include "activation_vectors.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

template <typename scalar_t>
struct Dots {
  const float* partial;  // [partials, num_rows]
  int64_t partials;
  const scalar_t* grad_output;  // [T, hidden]
  const scalar_t* down_bias;    // [E, hidden] or null
  int64_t hidden;
  const int32_t* expert_offsets;
  int64_t num_experts;
  const int32_t* permuted_to_slot;
  float* grad_topk_weights;
  RowMaps maps;
};

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) sum_dots_kernel(Dots<scalar_t> dots) {
  using Packed = Vector<scalar_t, full_width<scalar_t>()>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  const int64_t row_stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = first_row; row < dots.maps.num_rows; row += row_stride) {
    const int64_t slot = dots.permuted_to_slot[row];
    if (slot < 0 || slot >= dots.maps.num_slots) continue;
    // The product leaves nothing for a row of no expert.
    const int64_t expert = expert_of_row(dots.expert_offsets, dots.num_experts, row);
    float sum = 0.f;
    if (expert >= 0) {
      for (int64_t i = lane; i < dots.partials; i += kWarpSize) sum += dots.partial[i * dots.maps.num_rows + row];
      if (dots.down_bias) {
        const int64_t vectors = dots.hidden / full_width<scalar_t>();
        const auto* token = reinterpret_cast<const Packed*>(dots.grad_output) + slot / dots.maps.topk * vectors;
        const auto* bias = reinterpret_cast<const Packed*>(dots.down_bias) + expert * vectors;
        for (int64_t column = lane; column < vectors; column += kWarpSize) {
          const Packed a = token[column], b = bias[column];
#pragma unroll
          for (int i = 0; i < full_width<scalar_t>(); ++i) {
            sum += static_cast<float>(a.values[i]) * static_cast<float>(b.values[i]);
          }
        }
      }
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) dots.grad_topk_weights[slot] = sum;
  }
}

}  // namespace

std::optional<MlpRowGradients> fused_mlp_rows_backward(const MlpRows& rows, const Tensor& down_weight,
                                                       const std::string& layout) {
  const Tensor& gradient = rows.grad_output;
  if (gradient.scalar_type() == ScalarType::Float) return {};
  const RowMaps maps = rows.maps;
  const StoredWeight stored(down_weight, check_weight_layout(layout));
  const int64_t num_experts = rows.expert_offsets.numel() - 1, hidden = gradient.size(1);
  const int64_t width = rows.activation.output_width(rows.pre_activation.size(1));
  const DeviceGuard guard(gradient.get_device_index());
  FusedGemmArgs args = {};
  args.gemm = {nullptr,
               stored.weight.const_data_ptr(),
               nullptr,
               rows.expert_offsets.const_data_ptr<int32_t>(),
               num_experts,
               maps.num_rows,
               width,
               hidden,
               stored.layout,
               gemm_dtype(gradient, "grad_output"),
               nullptr,
               gradient.get_device_index(),
               current_stream(gradient)};
  args.gather = row_gather(gradient, rows.permuted_to_slot, maps);
  args.bias = rows.down_bias ? rows.down_bias->const_data_ptr() : nullptr;  // for its alignment
  args.mode = row_mode(rows.activation);
  args.activation = on_device(rows.activation);
  args.differentiation.pre_activation = rows.pre_activation.const_data_ptr();
  if (!fuses(args)) return {};
  args.bias = nullptr;

  const int64_t partials = ceil_div(width, kDifferentiatedColumns);
  MlpRowGradients result = {
      make_tensor(rows.pre_activation, {maps.num_rows, rows.pre_activation.size(1)}),
      make_tensor(gradient, {maps.num_rows, width}),
      // Dropped slots have no row: their weight gradient stays zero.
      torch::stable::new_zeros(gradient, {rows.topk_weights ? maps.num_tokens : 0, maps.topk}, ScalarType::Float)};
  Tensor partial_dots = make_tensor(gradient, {partials, maps.num_rows}, ScalarType::Float);
  args.differentiation.grad_pre_activation = result.grad_pre_activation.mutable_data_ptr();
  args.differentiation.scaled = result.scaled.mutable_data_ptr();
  args.differentiation.topk_weights = rows.topk_weights ? rows.topk_weights->const_data_ptr<float>() : nullptr;
  args.differentiation.partial_dots = partial_dots.mutable_data_ptr<float>();
  check_launched("moe_mlp_backward", launch_fused_grouped_gemm(args));
  if (!rows.topk_weights) return result;
  dispatch_floating_cuda(gradient.scalar_type(), "grad_output", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const Dots<scalar_t> dots = {partial_dots.const_data_ptr<float>(),
                                 partials,
                                 gradient.const_data_ptr<scalar_t>(),
                                 rows.down_bias ? rows.down_bias->const_data_ptr<scalar_t>() : nullptr,
                                 hidden,
                                 rows.expert_offsets.const_data_ptr<int32_t>(),
                                 num_experts,
                                 rows.permuted_to_slot.const_data_ptr<int32_t>(),
                                 result.grad_topk_weights.mutable_data_ptr<float>(),
                                 maps};
    const auto blocks = static_cast<unsigned>(std::min(ceil_div(maps.num_rows, kWarpsPerBlock), kMaxBlocks));
    launch_kernel(sum_dots_kernel<scalar_t>, blocks, kThreads, 0, current_stream(gradient), dots);
  });
  return result;
}

}  // namespace moe_ext::cuda
