// What a launch of product_kernel.h is given.
#pragma once

#include "tensor_map.h"

namespace moe_ext::sm90 {

// What the product sums over.
enum class Contraction {
  kFeatures,    // forward, and the gradient to the input
  kExpertRows,  // the gradient to the weights
};

struct ProductArguments {
  TensorMap a;  // forward [M, K]; wgrad [M, rows]
  TensorMap b;  // forward the weights; wgrad [M, columns]
  TensorMap d;  // forward [M, 1, N]; wgrad [E, rows, columns]
  const int32_t* expert_offsets;
  int64_t num_experts, max_rows;
  int64_t rows;     // of D inside one expert; wgrad only
  int64_t columns;  // of D
  int64_t depth;    // forward only
  void* output;     // D, for rows that no TMA store can write
  const void* bias;  // [E, columns] or null; forward only
};

}  // namespace moe_ext::sm90
