#include "expert_activation.h"

#include <torch/csrc/stable/library.h>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../common/tensors.h"
#include "activation_rows.h"

namespace moe_ext::cpu {

Tensor activate_rows(const Tensor& pre_activation, const ActivationSpec& spec) {
  const Tensor rows = as_contiguous(pre_activation);
  const int64_t row_width = rows.size(1), width = spec.output_width(row_width);
  Tensor output = new_empty_large(rows, {rows.size(0), width});
  dispatch_floating(rows.scalar_type(), "pre_activation", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* source = rows.const_data_ptr<scalar_t>();
    auto* destination = output.mutable_data_ptr<scalar_t>();
    const auto alpha = static_cast<acc_t>(spec.alpha), limit = static_cast<acc_t>(spec.limit);
    dispatch_activation_rows(spec, [&](auto kind, auto stride) {
      parallel_rows(rows.size(0), (row_width + width) * static_cast<int64_t>(sizeof(scalar_t)),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t row = begin; row < end; ++row) {
                        activate_row<kind.value, stride.value>(source + row * row_width, destination + row * width,
                                                               width, alpha, limit);
                      }
                    });
    });
  });
  return output;
}

Tensor expert_activation(const Tensor& pre_activation, std::string activation, std::string gate_up_layout,
                         double activation_alpha, double activation_limit) {
  return activate_rows(pre_activation, check_expert_activation(pre_activation, activation, gate_up_layout,
                                                               activation_alpha, activation_limit));
}

Tensor expert_activation_backward(const Tensor& grad_output, const Tensor& pre_activation, std::string activation,
                                  std::string gate_up_layout, double activation_alpha, double activation_limit) {
  const ActivationSpec spec = check_expert_activation_backward(grad_output, pre_activation, activation, gate_up_layout,
                                                               activation_alpha, activation_limit);
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor rows = as_contiguous(pre_activation);
  const int64_t row_width = rows.size(1), width = spec.output_width(row_width);
  Tensor grad_rows = new_empty_large(rows, {rows.size(0), row_width});
  dispatch_floating(rows.scalar_type(), "pre_activation", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using acc_t = accumulate_t<scalar_t>;
    const auto* source = rows.const_data_ptr<scalar_t>();
    const auto* grad = gradient.const_data_ptr<scalar_t>();
    auto* destination = grad_rows.mutable_data_ptr<scalar_t>();
    const auto alpha = static_cast<acc_t>(spec.alpha), limit = static_cast<acc_t>(spec.limit);
    dispatch_activation_rows(spec, [&](auto kind, auto stride) {
      parallel_rows(rows.size(0), (2 * row_width + width) * static_cast<int64_t>(sizeof(scalar_t)),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t row = begin; row < end; ++row) {
                        activate_row_backward<kind.value, stride.value>(source + row * row_width, grad + row * width,
                                                                        destination + row * row_width, width, alpha,
                                                                        limit);
                      }
                    });
    });
  });
  return grad_rows;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("expert_activation", TORCH_BOX(&moe_ext::cpu::expert_activation));
  m.impl("expert_activation_backward", TORCH_BOX(&moe_ext::cpu::expert_activation_backward));
}
