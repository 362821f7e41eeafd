// The emulated half of csrc/common/cuda_launch.h.
#pragma once

#include "cuda_emulator.h"

// The emulated kernels stand in for the CPU kernels, so that the tests run them on CPU tensors.
#define MOE_CUDA_DISPATCH_KEY CPU
#define MOE_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::moe_emulator::dynamic_shared())
#define STD_CUDA_CHECK(expression) static_cast<void>(expression)

using std::max;
using std::min;

namespace moe_ext {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
// Few enough that persistent kernels loop over their work.
inline int multiprocessor_count(const Tensor&) { return 3; }

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                     cudaStream_t, Arguments&&... arguments) {
  moe_emulator::require_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
  moe_emulator::run_grid(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); }, cluster);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  launch_clusters(kernel, grid, block, 1, shared_bytes, stream, arguments...);
}
// One kernel ends before the next one starts.
template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                       Arguments&&... arguments) {
  launch_clusters(kernel, grid, block, 1, shared_bytes, stream, arguments...);
}

template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
  moe_emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

}  // namespace moe_ext
