// The portable kernels: fp32, and 16-bit shapes that tensor-core kernels cannot take (N, K or a pointer unaligned).
#pragma once

#include "../grouped_gemm_kernels.h"

namespace moe_ext::simt {

void grouped_gemm(const GroupedGemmArgs& args, int multiprocessors);
void grouped_gemm_wgrad(const GroupedWgradArgs& args, int multiprocessors);

}  // namespace moe_ext::simt
