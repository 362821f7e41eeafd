// Tensors without the dispatcher: torch::stable looks an operator up by its name and boxes its arguments for every
// call, which takes longer than small ops themselves, most of all when caches hold something else.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "checks.h"
#include "poison.h"

namespace moe_ext {

// The tensor itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return as_contiguous(*tensor);
}

// Contiguous, without values, on the device of `like` and in its dtype unless another is asked for.
inline Tensor make_tensor(const Tensor& like, std::initializer_list<int64_t> sizes,
                          std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * std::max<int64_t>(1, sizes.begin()[axis]);
  }
  int32_t device_type, device_index, type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                                  type, device_type, device_index, &made));
  Tensor tensor(made);
  if (poisons_memory() && tensor.is_cpu()) {
    poison_if_asked(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size(),
                    tensor.scalar_type());
  }
  return tensor;
}

}  // namespace moe_ext
