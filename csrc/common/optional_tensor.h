// Optional tensor arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace moe_ext {

inline std::optional<torch::stable::Tensor> contiguous_if_any(const std::optional<torch::stable::Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  return torch::stable::contiguous(*tensor);
}

}  // namespace moe_ext
