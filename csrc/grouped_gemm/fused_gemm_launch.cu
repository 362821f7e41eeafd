// Launches the sm_90a products of fused_gemm.h.
#include "fused_gemm.h"
#include "kernel_choice.h"
#include "sm90/products.h"

namespace moe_ext {
namespace {

int64_t columns_of_output(const FusedGemmArgs& args) {
  return args.mode == cuda::RowMode::kPlain ? args.gemm.n : args.gemm.n / 2;
}

// The row of kSm90Tiles, -1 for no.
int pick_tile(const FusedGemmArgs& args) {
  const GroupedGemmArgs& gemm = args.gemm;
  if (gemm.max_rows == 0 || gemm.n == 0 || gemm.k == 0 || (args.gather.source && args.gather.num_slots == 0)) return -1;
  const Differentiation& to = args.differentiation;
  const bool aligned = fits_tensor_cores(gemm.dtype, gemm.n, args.gather.source ? args.gather.width : gemm.k,
                                         {gemm.input, args.gather.source, gemm.weight, gemm.output, args.bias,
                                          args.activated, to.pre_activation, to.grad_pre_activation, to.scaled});
  const bool activates = args.activation.kind != Activation::kNone && !to.pre_activation;
  const bool aligned_output = !activates || columns_of_output(args) % 8 == 0;
  if (!aligned || !aligned_output) return -1;
  return pick_sm90_tile(read_device(gemm.device), gemm.num_experts, ceil_div(gemm.max_rows, gemm.num_experts), gemm.n);
}

}  // namespace

bool fuses(const FusedGemmArgs& args) { return pick_tile(args) >= 0; }

const char* launch_fused_grouped_gemm(const FusedGemmArgs& args) {
#ifdef MOE_EXT_HAS_SM90
  const GroupedGemmArgs& gemm = args.gemm;
  const Differentiation& to = args.differentiation;
  const int tile = pick_tile(args), multiprocessors = read_device(gemm.device).multiprocessors;
  const int mode = static_cast<int>(args.mode), layout = static_cast<int>(gemm.layout);
  if (to.pre_activation) return sm90::differentiated_of(gemm.dtype)[mode][layout](args, multiprocessors);
  if (!args.activated) return sm90::products_of(tile, gemm.dtype).store[layout](args, multiprocessors);
  return sm90::activated_of(tile, gemm.dtype)[mode][layout](args, multiprocessors);
#else
  return "no sm_90a kernels in this build";
#endif
}

bool fuses(const GroupedWgradArgs& args, const RowGather& gather) {
  if (args.max_rows == 0 || args.n == 0 || args.k == 0 || gather.num_slots == 0) return false;
  const bool nk = args.layout == WeightLayout::kENK;
  return fits_tensor_cores(args.dtype, args.n, args.k, {gather.source, args.grad_output, args.grad_weight}) &&
         pick_sm90_tile(read_device(args.device), args.num_experts, nk ? args.n : args.k, nk ? args.k : args.n) >= 0;
}

const char* launch_gathered_wgrad(const GroupedWgradArgs& args, const RowGather& gather) {
#ifdef MOE_EXT_HAS_SM90
  const DeviceProperties device = read_device(args.device);
  const bool nk = args.layout == WeightLayout::kENK;
  const int tile = pick_sm90_tile(device, args.num_experts, nk ? args.n : args.k, nk ? args.k : args.n);
  const sm90::Products& products = sm90::products_of(tile, args.dtype);
  return (args.float32_output ? products.wgrad_fp32 : products.wgrad)(args, gather, device.multiprocessors);
#else
  return "no sm_90a kernels in this build";
#endif
}

}  // namespace moe_ext
