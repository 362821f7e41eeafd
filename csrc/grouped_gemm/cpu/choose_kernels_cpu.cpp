#include <cstdlib>
#include <string>

#include "../../common/checks.h"
#include "multiply_tile.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace moe_ext::cpu {
namespace {

using KernelsOf = const GemmKernels& (*)(GemmType type, bool wide);

KernelsOf kernels_of_machine() {
  const char* name = std::getenv("MOE_EXT_CPU_ISA");
  const std::string wanted = name ? name : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("x86-64-v3"), avx512 = avx2 && __builtin_cpu_supports("x86-64-v4");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  MOE_CHECK(wanted.empty() || wanted == "portable" || (wanted == "avx2" && avx2) || (wanted == "avx512" && avx512) ||
                (wanted == "avx512_bf16" && bf16),
            "MOE_EXT_CPU_ISA: expected portable", avx2 ? ", avx2" : "", avx512 ? ", avx512" : "",
            bf16 ? ", avx512_bf16" : "", " on this machine, got ", wanted);
  if (wanted == "portable" || !avx2) return &portable::gemm_kernels;
  if (wanted == "avx2" || !avx512) return &avx2::gemm_kernels;
  if (wanted == "avx512" || !bf16) return &avx512::gemm_kernels;
  return &avx512_bf16::gemm_kernels;
#else
  MOE_CHECK(wanted.empty() || wanted == "portable", "MOE_EXT_CPU_ISA: expected portable on this machine, got ", wanted);
  return &portable::gemm_kernels;
#endif
}

}  // namespace

const GemmKernels& choose_kernels(ScalarType dtype, ScalarType output_dtype) {
  static const KernelsOf kernels_of = kernels_of_machine();
  const GemmType type = dtype == ScalarType::Double     ? GemmType::kFloat64
                        : dtype == ScalarType::BFloat16 ? GemmType::kBFloat16
                        : dtype == ScalarType::Half     ? GemmType::kFloat16
                                                        : GemmType::kFloat32;
  return kernels_of(type, dtype != output_dtype);
}

bool multiplies_whole_vectors(const GemmKernels& kernels) {
#if defined(__x86_64__)
  static const bool in_halves = [] {
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 8 & 15) + (eax >> 20 & 255) == 25;
  }();
  return !in_halves && kernels.vector_elements / kernels.elements_per_unit * kernels.unit_bytes == 64;
#else
  return false;
#endif
}

}  // namespace moe_ext::cpu
