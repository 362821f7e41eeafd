// grouped_gemm on CUDA: one kernel where experts hold few rows (small_rows/) or where there is one for all of it
// (fused_gemm.h); else gather, product, and bias with activation, each a pass of its own.
// Traffic beside the product: a gather reads and writes M*K elements; bias or activation reads M*N and writes M*N
//   (bias, or a kept pre-activation) and the activated rows.
#include "grouped_gemm.h"

#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "../common/tensors.h"
#include "../experts/activation_epilogue.h"
#include "../permutation/permute.h"
#include "fused_gemm.h"
#include "launch_arguments.h"
#include "small_rows/grouped_gemm_small_rows.h"

namespace moe_ext::cuda {
namespace {

// Gather, product, bias and activation in one kernel; nothing if there is none for these shapes and this device.
// Everything contiguous.
std::optional<std::tuple<Tensor, Tensor>> multiply_fused(const GroupedGemmShape& shape, const Tensor& input,
                                                         const StoredWeight& stored, const Tensor& offsets,
                                                         const std::optional<Tensor>& biases,
                                                         const std::optional<Tensor>& slots, bool save_pre_activation) {
  const bool activates = shape.activation.kind != Activation::kNone;
  if (!activates && !biases && !slots) return {};
  FusedGemmArgs args = {};
  args.gemm = {slots ? nullptr : input.const_data_ptr(),
               stored.weight.const_data_ptr(),
               nullptr,
               offsets.const_data_ptr<int32_t>(),
               shape.num_experts,
               shape.num_rows,
               shape.out_features,
               shape.in_features,
               stored.layout,
               gemm_dtype(input, "input"),
               nullptr,
               input.get_device_index(),
               current_stream(input)};
  if (slots) args.gather = row_gather(input, *slots, *shape.gather);
  args.bias = biases ? biases->const_data_ptr() : nullptr;
  args.mode = row_mode(shape.activation);
  args.activation = on_device(shape.activation);
  if (!fuses(args)) return {};
  const bool keep_product = !activates || save_pre_activation;
  Tensor product = make_tensor(input, {keep_product ? shape.num_rows : 0, shape.out_features});
  if (keep_product) args.gemm.output = product.mutable_data_ptr();
  if (!activates) {
    check_launched("grouped_gemm", launch_fused_grouped_gemm(args));
    return std::tuple(product, make_tensor(input, {0, shape.out_features}));
  }
  Tensor output = make_tensor(input, {shape.num_rows, shape.activation.output_width(shape.out_features)});
  args.activated = output.mutable_data_ptr();
  check_launched("grouped_gemm", launch_fused_grouped_gemm(args));
  return std::tuple(output, product);
}

// Everything contiguous; nothing if the shapes or pointers do not suit small_rows/.
std::optional<std::tuple<Tensor, Tensor>> multiply_small_rows(const GroupedGemmShape& shape, const Tensor& input,
                                                              const StoredWeight& stored, const Tensor& offsets,
                                                              const std::optional<Tensor>& biases,
                                                              const std::optional<Tensor>& slots,
                                                              bool save_pre_activation) {
  small_rows::Arguments args = {};
  args.input = input.const_data_ptr();
  args.weight = stored.weight.const_data_ptr();
  args.bias = biases ? biases->const_data_ptr() : nullptr;
  args.expert_offsets = offsets.const_data_ptr<int32_t>();
  args.permuted_to_slot = slots ? slots->const_data_ptr<int32_t>() : nullptr;
  args.num_slots = shape.gather ? shape.gather->num_slots : 0;
  args.topk = shape.gather ? shape.gather->topk : 1;
  args.num_experts = shape.num_experts;
  args.max_rows = shape.num_rows;
  args.n = shape.out_features;
  args.k = shape.in_features;
  args.layout = stored.layout;
  args.dtype = gemm_dtype(input, "input");
  args.activation = shape.activation;
  if (!small_rows::takes(args)) return {};
  const bool save = save_pre_activation && shape.activation.kind != Activation::kNone;
  Tensor output = make_tensor(input, {shape.num_rows, shape.activation.output_width(shape.out_features)});
  Tensor pre_activation = make_tensor(input, {save ? shape.num_rows : 0, shape.out_features});
  args.output = output.mutable_data_ptr();
  args.pre_activation = save ? pre_activation.mutable_data_ptr() : nullptr;
  small_rows::grouped_gemm(args, input.get_device_index(), current_stream(input));
  return std::tuple(output, pre_activation);
}

}  // namespace

std::tuple<Tensor, Tensor> grouped_gemm(const Tensor& input, const Tensor& weight, const Tensor& expert_offsets,
                                        std::string weight_layout, const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& permuted_to_slot,
                                        const std::optional<Tensor>& slot_to_permuted, int64_t topk,
                                        std::string activation, std::string gate_up_layout, double activation_alpha,
                                        double activation_limit, bool save_pre_activation) {
  const GroupedGemmShape shape =
      check_grouped_gemm(input, weight, expert_offsets, weight_layout, bias, permuted_to_slot, slot_to_permuted, topk,
                         activation, gate_up_layout, activation_alpha, activation_limit);
  const GemmDtype dtype = gemm_dtype(input, "input");
  const DeviceGuard guard(input.get_device_index());
  const Tensor source = as_contiguous(input);
  const Tensor offsets = as_contiguous(expert_offsets);
  const std::optional<Tensor> biases = as_contiguous(bias);
  const StoredWeight stored(weight, shape.layout);
  if (auto few = multiply_small_rows(shape, source, stored, offsets, biases, as_contiguous(permuted_to_slot),
                                     save_pre_activation)) {
    return *few;
  }
  if (auto fused = multiply_fused(shape, source, stored, offsets, biases, as_contiguous(permuted_to_slot),
                                  save_pre_activation)) {
    return *fused;
  }
  const Tensor rows = shape.gather ? permute(source, *permuted_to_slot, *slot_to_permuted, topk) : source;
  const Workspace workspace(input, shape.num_experts);
  Tensor product = make_tensor(input, {shape.num_rows, shape.out_features});
  check_launched("grouped_gemm",
                 launch_grouped_gemm({rows.const_data_ptr(), stored.weight.const_data_ptr(), product.mutable_data_ptr(),
                                      offsets.const_data_ptr<int32_t>(), shape.num_experts, shape.num_rows,
                                      shape.out_features, shape.in_features, stored.layout, dtype, workspace.start,
                                      input.get_device_index(), current_stream(input)}));

  if (shape.activation.kind == Activation::kNone) {
    if (biases) add_bias(product, *biases, offsets);
    return {product, make_tensor(input, {0, shape.out_features})};
  }
  const Tensor output = activate_with_bias(product, biases, offsets, shape.activation, save_pre_activation);
  return {output, save_pre_activation ? product : make_tensor(input, {0, shape.out_features})};
}

}  // namespace moe_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(moe_ext, MOE_CUDA_DISPATCH_KEY, m) {
  m.impl("grouped_gemm", TORCH_BOX(&moe_ext::cuda::grouped_gemm));
}
