// Zeroes what no grouped product writes. The sm_90a products do it themselves.
#pragma once

#include "grouped_gemm_kernels.h"

namespace moe_ext {

// Rows of the output before the first expert and past the last.
void zero_rows_of_no_expert(const GroupedGemmArgs& args, int multiprocessors);

// Gradients of empty experts, which CUTLASS's kernels leave alone; aligned to 16 bytes, as these kernels need.
void zero_empty_experts(const GroupedWgradArgs& args);

}  // namespace moe_ext
