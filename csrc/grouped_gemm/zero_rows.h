// Zeroes what no grouped product writes.
#pragma once

#include "grouped_gemm_kernels.h"

namespace moe_ext {

// Rows of `output` (max_rows rows of `row_bytes`) before the first expert and past the last.
void zero_rows_of_no_expert(void* output, int64_t row_bytes, const GroupedGemmArgs& args, int multiprocessors);

// Gradients of empty experts, after CUTLASS's kernels, which need aligned gradients; the others write zeros themselves.
void zero_empty_experts(const GroupedWgradArgs& args);

}  // namespace moe_ext
