// What grouped_gemm does to its product on CUDA: bias, then activation, in one pass. Everything contiguous.
#pragma once

#include <optional>

#include "../common/dtypes.h"
#include "activation.h"

namespace moe_ext::cuda {

// product[m, :] += bias[expert of row m], in fp32, rounded once more; rows of no expert are left alone.
void add_bias(Tensor& product, const Tensor& bias, const Tensor& expert_offsets);

// Returns activation(product + bias). With `keep_pre_activation` product becomes product + bias.
Tensor activate_with_bias(Tensor& product, const std::optional<Tensor>& bias, const Tensor& expert_offsets,
                          const ActivationSpec& spec, bool keep_pre_activation);

}  // namespace moe_ext::cuda
