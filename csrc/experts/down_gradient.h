// The way back through one expert's down projection and activation on the CPU. With H the pre-activation, A =
// activation(H), s the router weight of a row's slot and dA' = dO @ down^T, the gradient at A before the router weight:
//   grad_pre_activation = s dA' activation'(H)     zeros for a row without slot
//   activated           = s A                      the down projection's gradient is dO^T (s A)
//   grad_topk_weights   = <dA', A> + <dO, down_bias>
// so that neither the expert's outputs nor their gradients are ever stored (the identity is SonicMoE's).
#pragma once

#include "../grouped_gemm/cpu/multiply_tile.h"
#include "activation_blocks.h"

namespace moe_ext::cpu {

// What all experts of a call share.
class DownGradient {
 public:
  // One expert's rows; pointers are to its first.
  struct Rows {
    const int32_t* slots;
    RowMaps maps;
    const char* topk_weights;    // of all slots, or null: ones
    const char* pre_activation;  // [rows, width]
    char* activated;             // [rows, I]
    char* grad_pre_activation;   // [rows, width]
    double* dots;                // [rows, panels]: <dA', A> of each panel of columns
    int64_t panels;
  };

  DownGradient(ScalarType dtype, const ActivationSpec& spec, int64_t width)
      : kernels_(choose_kernels(dtype, dtype)),
        is_double_(dtype == ScalarType::Double),
        activation_(spec),
        width_(width),
        blocks_(activation_blocks(spec, is_double_)) {}

  // One tile of dA', the product of dO and the weights, and all of the above but the sum of the dots.
  void run(const Product& product, const Rows& rows, const Tile& tile) const;
  // grad_topk_weights [slot] of the expert's rows; `bias` is its down_bias, or null.
  void sum_dots(const Rows& rows, int64_t num_rows, const char* grad_output, const char* bias, int64_t hidden_size,
                char* grad_topk_weights) const;
  // output [cols] = sum of rows [num_rows][cols], for the bias of the up projection.
  void sum_rows(const char* rows, int64_t num_rows, int64_t cols, char* output) const;

 private:
  const GemmKernels& kernels_;
  bool is_double_;
  ActivationSpec activation_;
  int64_t width_;
  ActivationBlocks blocks_;
};

}  // namespace moe_ext::cpu
