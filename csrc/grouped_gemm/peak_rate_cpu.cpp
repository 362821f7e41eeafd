// The benchmark's ceiling: multiply-adds from register to register, the rate that no product on this machine exceeds.
// bench/machine.py calls it by its name in the library; it is no op.
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace moe_ext::cpu {
namespace {

// loop(iterations): so many rounds of kRegisters independent multiply-adds of kLanes each. The empty assembly makes
// every accumulator change under the compiler's eyes, so that no round is merged with the next.
struct MultiplyAddLoop {
  void (*loop)(int64_t iterations);
  int64_t flops;  // of one iteration
};

#define MOE_MULTIPLY_ADD_LOOP(name, attributes, Vec, registers, constraint, multiply_add) \
  attributes void name(int64_t iterations) {                                              \
    Vec sums[registers] = {}, a = {}, b = {};                                             \
    asm volatile("" : "+" constraint(a), "+" constraint(b));                              \
    for (int64_t i = 0; i < iterations; ++i) {                                            \
      _Pragma("GCC unroll 32") for (int j = 0; j < registers; ++j) {                      \
        sums[j] = multiply_add;                                                           \
        asm volatile("" : "+" constraint(sums[j]));                                       \
      }                                                                                   \
    }                                                                                     \
  }

typedef float Floats4 __attribute__((vector_size(16)));
#if defined(__x86_64__)
MOE_MULTIPLY_ADD_LOOP(multiply_add_baseline, , Floats4, 12, "x", a* b + sums[j])
MOE_MULTIPLY_ADD_LOOP(multiply_add_avx2, __attribute__((target("avx2,fma"))), __m256, 12, "x",
                      _mm256_fmadd_ps(a, b, sums[j]))
MOE_MULTIPLY_ADD_LOOP(multiply_add_avx512, __attribute__((target("avx512f"))), __m512, 24, "v",
                      _mm512_fmadd_ps(a, b, sums[j]))
MOE_MULTIPLY_ADD_LOOP(multiply_add_avx512_bf16, __attribute__((target("avx512f,avx512bf16"))), __m512, 24, "v",
                      _mm512_dpbf16_ps(sums[j], reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)))
#elif defined(__aarch64__)
MOE_MULTIPLY_ADD_LOOP(multiply_add_baseline, , Floats4, 24, "w", a* b + sums[j])
#else
MOE_MULTIPLY_ADD_LOOP(multiply_add_baseline, , Floats4, 12, "m", a* b + sums[j])
#endif
#undef MOE_MULTIPLY_ADD_LOOP

// The fastest that this machine has, for bfloat16 factors or for float32 ones.
MultiplyAddLoop multiply_add_loop(bool bfloat16) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (bfloat16 && __builtin_cpu_supports("avx512bf16")) return {&multiply_add_avx512_bf16, 24 * 32 * 2};
  if (__builtin_cpu_supports("avx512f")) return {&multiply_add_avx512, 24 * 16 * 2};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {&multiply_add_avx2, 12 * 8 * 2};
  return {&multiply_add_baseline, 12 * 4 * 2};
#elif defined(__aarch64__)
  return {&multiply_add_baseline, 24 * 4 * 2};
#else
  return {&multiply_add_baseline, 12 * 4 * 2};
#endif
}

}  // namespace
}  // namespace moe_ext::cpu

// At least `flops` floating-point operations, an equal part on each of torch's threads.
extern "C" __attribute__((visibility("default"))) void moe_ext_spend_flops(double flops, bool bfloat16) {
  const moe_ext::cpu::MultiplyAddLoop multiply_add = moe_ext::cpu::multiply_add_loop(bfloat16);
  const int64_t threads = torch::stable::get_num_threads();
  const auto iterations = static_cast<int64_t>(flops / static_cast<double>(multiply_add.flops * threads)) + 1;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) multiply_add.loop(iterations);
  });
}
