// expert_activation: f(pre_activation), or f(gate) * up; activation.h has the formulas. 16-bit data is computed in
// fp32. expert_activation_backward: its gradient to the pre-activation.
#pragma once

#include "../common/dtypes.h"
#include "activation.h"

namespace moe_ext {

inline ActivationSpec check_expert_activation(const Tensor& pre_activation, const std::string& activation,
                                              const std::string& gate_up_layout, double activation_alpha,
                                              double activation_limit) {
  check_tensor(pre_activation, "pre_activation", {MOE_FLOATING}, 2, "[num_rows, width]");
  return check_activation(activation, gate_up_layout, activation_alpha, activation_limit, false,
                          pre_activation.size(1));
}

inline ActivationSpec check_expert_activation_backward(const Tensor& grad_output, const Tensor& pre_activation,
                                                       const std::string& activation, const std::string& gate_up_layout,
                                                       double activation_alpha, double activation_limit) {
  const ActivationSpec spec =
      check_expert_activation(pre_activation, activation, gate_up_layout, activation_alpha, activation_limit);
  check_tensor(grad_output, "grad_output", {pre_activation.scalar_type()}, 2, "[num_rows, activated width]");
  check_size(grad_output, "grad_output", 0, pre_activation.size(0), "num_rows, as in pre_activation");
  check_size(grad_output, "grad_output", 1, spec.output_width(pre_activation.size(1)),
             spec.gated() ? "half of the width of pre_activation" : "the width of pre_activation");
  check_same_device(grad_output, "grad_output", pre_activation, "pre_activation");
  return spec;
}

#define MOE_DECLARE_EXPERT_ACTIVATION                                                                                \
  Tensor expert_activation(const Tensor& pre_activation, std::string activation, std::string gate_up_layout,         \
                           double activation_alpha, double activation_limit);                                        \
  Tensor expert_activation_backward(const Tensor& grad_output, const Tensor& pre_activation, std::string activation, \
                                    std::string gate_up_layout, double activation_alpha, double activation_limit);   \
  /* expert_activation after its checks; what grouped_gemm runs on its product. */                                   \
  Tensor activate_rows(const Tensor& pre_activation, const ActivationSpec& spec);
namespace cpu {
MOE_DECLARE_EXPERT_ACTIVATION
}
namespace cuda {
MOE_DECLARE_EXPERT_ACTIVATION
}
#undef MOE_DECLARE_EXPERT_ACTIVATION

}  // namespace moe_ext
