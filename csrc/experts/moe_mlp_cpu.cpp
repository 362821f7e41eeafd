#include "moe_mlp.h"

#include <torch/csrc/stable/library.h>

#include "moe_mlp_compose.h"

namespace moe_ext::cpu {
namespace {

struct Backend {
  static constexpr bool kGathersFirst = false;
  static constexpr auto grouped_gemm = &cpu::grouped_gemm;
  static constexpr auto grouped_gemm_wgrad = &cpu::grouped_gemm_wgrad;
  static constexpr auto grouped_bias_grad = &cpu::grouped_bias_grad;
  static constexpr auto permute = &cpu::permute;
  static constexpr auto unpermute = &cpu::unpermute;
  static constexpr auto mlp_rows_backward = &cpu::mlp_rows_backward;
  static constexpr auto down_bias_grad = &cpu::down_bias_grad;
};

}  // namespace

MOE_DEFINE_MOE_MLP(Backend)

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&moe_ext::cpu::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_ext::cpu::moe_mlp_backward));
}
