// The row-wise half of moe_mlp's backward, between its grouped GEMMs. Row m holds slot = permuted_to_slot[m], the slot
// of token slot / topk; a row without slot is padding or tail.
//
// With H the pre-activation, A = activation(H), s the router weight of the row's slot, and dA' = dO W2 the gradient at
// A before the router weight:
//   grad_pre_activation = s * dA' * activation'(H)       zeros for a row without slot
//   grad_activated     := s * A                          in place of dA'; the down projection's gradient is dO^T (s A)
//   grad_topk_weights[slot] = <dA', A> + <dO[token], down_bias of the row's expert>
// so that neither the expert outputs nor their gradients are ever stored (the identity is SonicMoE's).
#pragma once

#include <optional>
#include <string>

#include "../common/dtypes.h"
#include "../common/row_maps.h"
#include "activation.h"

namespace moe_ext {

struct MlpRows {
  const Tensor& pre_activation;               // [M, 2I] or [M, I]
  const Tensor& grad_output;                  // [T, H], read only for down_bias
  const Tensor& expert_offsets;               // [E + 1]
  const Tensor& permuted_to_slot;             // [M]
  const std::optional<Tensor>& topk_weights;  // [T, topk]; absent: ones, and no gradient
  const std::optional<Tensor>& down_bias;     // [E, H]
  RowMaps maps;
  ActivationSpec activation;
};

struct MlpRowGradients {
  Tensor grad_pre_activation;  // [M, 2I or I]
  Tensor scaled;               // s * A, [M, I]
  Tensor grad_topk_weights;    // [T, topk], or [0, topk] without topk_weights
};

// All tensors contiguous. mlp_rows_backward overwrites `grad_activated`, which holds dA', with s * A. down_bias_grad
// sums s * dO[token] over the rows of each expert: [E, H].
#define MOE_DECLARE_MLP_ROWS                                                     \
  MlpRowGradients mlp_rows_backward(const MlpRows& rows, Tensor grad_activated); \
  Tensor down_bias_grad(const MlpRows& rows, ScalarType dtype);
namespace cpu {
MOE_DECLARE_MLP_ROWS
}
namespace cuda {
MOE_DECLARE_MLP_ROWS
// dA' = gathered dO times `down_weight` (of `layout`) and the row-wise half above in one kernel; nothing where there is
// none for these shapes and this device.
std::optional<MlpRowGradients> fused_mlp_rows_backward(const MlpRows& rows, const Tensor& down_weight,
                                                       const std::string& layout);
}  // namespace cuda
#undef MOE_DECLARE_MLP_ROWS

}  // namespace moe_ext
