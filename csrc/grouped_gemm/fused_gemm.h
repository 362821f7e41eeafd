// Grouped products with what stands around them in the same kernel. sm_90a has such kernels; a caller asks `fuses` and
// composes the pieces itself where the answer is no.
#pragma once

#include "../common/divisor.h"
#include "../experts/activation_vectors.h"
#include "grouped_gemm_kernels.h"

namespace moe_ext {

// Operand rows that lie elsewhere: row m is source[permuted_to_slot[m] / topk], zeros for a slot out of range.
struct RowGather {
  const void* source;  // [num_slots / topk, width], or null: no gather
  const int32_t* permuted_to_slot;
  int64_t width;
  int num_slots;
  Divisor topk;
  bool is_a;  // which operand; forward products gather A

  // -1 for a slot out of range.
  __device__ int token_of(int slot) const {
    const int token = topk.divide(slot);  // of any slot: cheaper than a branch
    return slot >= 0 && slot < num_slots ? token : -1;
  }
};

// With H the pre-activation, A = activation(H), s the router weight of the row's slot: D = dA' becomes
//   grad_pre_activation = s * dA' * activation'(H),  scaled = s * A,  partial_dots[column tile][row] = <dA', A>
// as in experts/moe_mlp_rows.h; zeros for a row without slot.
struct Differentiation {
  const void* pre_activation;
  void* grad_pre_activation;
  void* scaled;
  const float* topk_weights;  // or null: ones
  float* partial_dots;
};

struct FusedGemmArgs {
  GroupedGemmArgs gemm;  // gemm.input is not read under a gather; gemm.output null: the product itself is not kept
  RowGather gather = {};
  const void* bias = nullptr;  // [E, n]
  // With an activation: activated = activation(product + bias), [max_rows, n or n / 2], beside product + bias.
  cuda::RowMode mode = cuda::RowMode::kPlain;
  cuda::DeviceActivation activation = {};
  void* activated = nullptr;
  // With `differentiation.pre_activation`: the gradient of a product's activation instead, mode and activation as
  // above, n the width of the activation's output; its rows are gathered. Nothing else is written.
  Differentiation differentiation = {};
};

// Columns whose dot products make one of Differentiation::partial_dots.
constexpr int64_t kDifferentiatedColumns = 128;

// Outputs may still be null.
bool fuses(const FusedGemmArgs& args);
// Only where `fuses`. Rows of no expert become zero in every output. nullptr, or what went wrong.
const char* launch_fused_grouped_gemm(const FusedGemmArgs& args);

// The same for a weight gradient one of whose operands is gathered: `gather.is_a` is ignored, the input is gathered.
bool fuses(const GroupedWgradArgs& args, const RowGather& gather);
const char* launch_gathered_wgrad(const GroupedWgradArgs& args, const RowGather& gather);

}  // namespace moe_ext
