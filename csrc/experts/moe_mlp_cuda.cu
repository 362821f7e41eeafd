// moe_mlp and its backward on CUDA: the composition of moe_mlp_compose.h.
// Launches: on sm_90a in 16 bits two products, which gather and activate, and the weighted sum; backward four products,
//   which gather and differentiate, the sum of dot products, the sum to tokens. Elsewhere gather, product, activation,
//   product, weighted sum; backward two gathers, four products, the row kernel, the sum to tokens. Bound: the grouped
//   products (tensor cores), or reading the weights when rows are few.
#include "moe_mlp.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "moe_mlp_compose.h"

namespace moe_ext::cuda {
namespace {

struct Backend {
  static constexpr auto grouped_gemm = &cuda::grouped_gemm;
  static constexpr auto grouped_gemm_wgrad = &cuda::grouped_gemm_wgrad;
  static constexpr auto grouped_bias_grad = &cuda::grouped_bias_grad;
  static constexpr auto permute = &cuda::permute;
  static constexpr auto unpermute = &cuda::unpermute;
  static constexpr auto mlp_rows_backward = &cuda::mlp_rows_backward;
  static constexpr auto fused_mlp_rows_backward = &cuda::fused_mlp_rows_backward;
  static constexpr auto down_bias_grad = &cuda::down_bias_grad;
};

}  // namespace

MOE_DEFINE_MOE_MLP(Backend)

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("moe_mlp", TORCH_BOX(&moe_ext::cuda::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_ext::cuda::moe_mlp_backward));
}
