// grouped_bias_grad on CUDA; its kernel is in grouped_gemm_launch.cu. Traffic: M*N elements read. Bound: device memory.
#include "grouped_bias_grad.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../common/tensors.h"
#include "launch_arguments.h"

namespace moe_ext::cuda {

Tensor grouped_bias_grad(const Tensor& grad_output, const Tensor& expert_offsets, std::optional<ScalarType> out_dtype) {
  const GroupedBiasShape shape = check_grouped_bias_grad(grad_output, expert_offsets, out_dtype);
  const GemmDtype dtype = gemm_dtype(grad_output, "grad_output");
  const DeviceGuard guard(grad_output.get_device_index());
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor offsets = as_contiguous(expert_offsets);
  Tensor grad_bias = make_tensor(grad_output, {shape.num_experts, shape.out_features}, shape.out_dtype);
  check_launched("grouped_bias_grad",
                 launch_grouped_bias_grad({gradient.const_data_ptr(), grad_bias.mutable_data_ptr(),
                                           offsets.const_data_ptr<int32_t>(), shape.num_experts, shape.num_rows,
                                           shape.out_features, dtype, shape.out_dtype == ScalarType::Float,
                                           grad_output.get_device_index(), current_stream(grad_output)}));
  return grad_bias;
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("grouped_bias_grad", TORCH_BOX(&moe_ext::cuda::grouped_bias_grad));
}
