// What every CUDA kernel file needs: the current stream, launches, 16-byte accesses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "dtypes.h"

#ifdef MOE_EXT_EMULATED
// The kernels compiled as C++ and run on the CPU, for tests: tests/emulation/cuda_emulator.h.
#include "launch_emulated.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define MOE_CUDA_DISPATCH_KEY CUDA
#define MOE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace moe_ext {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// An error of a call to the runtime. It is taken from this library's own copy of the runtime too: left there, the next
// launch would report it as its own.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  STD_CUDA_CHECK(error);
}

inline int multiprocessor_count(const Tensor& tensor) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

// kernel<<<...>>>(args...), with a bad configuration reported at once and without a sync.
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename... Parameters, typename... Arguments>
void launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                 size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// As launch_kernel, with `cluster` neighbouring blocks of the grid on neighbouring multiprocessors; sm_90.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                     cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  launch_with(attribute, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

// As launch_kernel, but the kernel may be placed while the one before it in the stream ends, for which it waits itself;
// code for sm_90.
template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                       Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch_with(attribute, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

// Lets `kernel` have so much dynamic shared memory, more than 48 KiB too, at its next launch on the current device. No
// stream operation: allowed under capture.
template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), size_t bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

}  // namespace moe_ext
#endif

namespace moe_ext {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kWarpSize = 32;
constexpr int64_t kVectorBytes = 16;
// Grids are capped and kernels loop: the x dimension of a grid ends at 2^31 - 1, and a full machine is enough.
constexpr int64_t kMaxBlocks = 1 << 20;

// `width` consecutive elements moved as one access; width * sizeof(T) is 16, or sizeof(T) where rows are unaligned.
template <typename T, int width>
struct alignas(sizeof(T) * width) Vector {
  T values[width];
};

template <typename T>
constexpr int full_width() {
  return static_cast<int>(kVectorBytes / sizeof(T));
}

// 16-byte accesses need the pointer and the row length to be multiples of 16 bytes.
template <typename T>
bool rows_are_vectorizable(int64_t row_length, std::initializer_list<const void*> pointers) {
  bool aligned = row_length % full_width<T>() == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
  return aligned;
}

}  // namespace moe_ext
