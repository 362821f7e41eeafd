// What a launch of product_kernel.h is given.
#pragma once

#include "../fused_gemm.h"
#include "tensor_map.h"

namespace moe_ext::sm90 {

// What the product sums over.
enum class Contraction {
  kFeatures,    // forward, and the gradient to the input
  kExpertRows,  // the gradient to the weights
};

// What becomes of D, the product.
enum class Finish {
  kStore,          // D + bias is stored
  kActivate,       // activation(D + bias) is stored, D + bias too where it is kept
  kDifferentiate,  // D is the gradient at an activation's output: see Differentiation
};

struct ProductArguments {
  TensorMap a;  // forward [M, K]; wgrad [M, rows]
  TensorMap b;  // forward the weights; wgrad [M, columns]
  TensorMap d;  // forward [M, 1, N], under a concatenated gate and up [M, 2, N / 2]; wgrad [E, rows, columns]
  const int32_t* expert_offsets;
  const bool* trainable_experts;  // wgrad: null for all
  int64_t num_experts, max_rows;
  int64_t rows;      // of D inside one expert; wgrad only
  int64_t columns;   // of D; under a concatenated gate and up, of each of the two
  int64_t depth;     // forward only
  void* output;      // forward: D again, for rows that no TMA store can write; null: D is not kept
  const void* bias;  // [E, width of D] or null; forward only
  RowGather gather;
  cuda::DeviceActivation activation;
  void* activated;
  Differentiation differentiation;
};

}  // namespace moe_ext::sm90
