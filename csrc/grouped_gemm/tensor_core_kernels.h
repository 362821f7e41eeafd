// The compiled CUTLASS kernels, by name. cmake/GroupedGemmKernels.cmake writes one file for each; a name that
// stands here and not there does not link.
#pragma once

#include "problem_arrays.h"

namespace moe_ext {

// Problem arrays are filled on `stream`, `groups` of them, at the head of `workspace`.
struct TensorCoreProblem {
  void* workspace;
  int64_t groups;
  int device, multiprocessors;
  cudaStream_t stream;
};

#define MOE_TENSOR_CORE_KERNELS(declare)                                                                  \
  declare(forward_enk_bf16) declare(forward_enk_fp16) declare(forward_ekn_bf16) declare(forward_ekn_fp16) \
      declare(wgrad_bf16) declare(wgrad_fp16) declare(wgrad_bf16_fp32) declare(wgrad_fp16_fp32)

// nullptr, or what went wrong.
#define MOE_DECLARE(name)                             \
  namespace sm90_cutlass {                            \
  const char* name(const TensorCoreProblem& problem); \
  }                                                   \
  namespace sm80 {                                    \
  const char* name(const TensorCoreProblem& problem); \
  }
MOE_TENSOR_CORE_KERNELS(MOE_DECLARE)
#undef MOE_DECLARE

}  // namespace moe_ext
