// What the launchers ask before they pick a kernel.
#pragma once

#include <cstdlib>

#include "../common/cuda_launch.h"
#include "grouped_gemm_kernels.h"
#include "tile_choice.h"

namespace moe_ext {

struct DeviceProperties {
  int capability = 0, multiprocessors = 0;
};

inline DeviceProperties read_device(int device) {
#ifdef MOE_EXT_EMULATED
  const char* capability = std::getenv("MOE_EMULATOR_CAPABILITY");
  return {capability ? std::atoi(capability) : 0, 3};
#else
  int major = 0, minor = 0;
  DeviceProperties properties;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  check_cuda(cudaDeviceGetAttribute(&properties.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  properties.capability = 10 * major + minor;
  return properties;
#endif
}

inline int element_bytes(GemmDtype dtype) { return dtype == GemmDtype::kFloat32 ? 4 : 2; }

constexpr int kTensorCoreAlignment = 16;

// Tensor-core kernels: 16-bit elements, 16-byte aligned rows and pointers.
inline bool fits_tensor_cores(GemmDtype dtype, int64_t n, int64_t k, std::initializer_list<const void*> pointers) {
  bool fits = dtype != GemmDtype::kFloat32 && n * 2 % kTensorCoreAlignment == 0 && k * 2 % kTensorCoreAlignment == 0;
  for (const void* pointer : pointers) fits = fits && reinterpret_cast<uintptr_t>(pointer) % kTensorCoreAlignment == 0;
  return fits;
}

// The sm_90a product's row of kSm90Tiles for D of average shape rows x columns; -1: another kernel must do it.
inline int pick_sm90_tile(const DeviceProperties& device, int64_t groups, int64_t rows, int64_t columns) {
#ifdef MOE_EXT_HAS_SM90
  if (device.capability != 90) return -1;
  const int tile = choose_sm90_tile(groups, rows, columns, device.multiprocessors);
  return tile == kCutlassSm90Tile ? -1 : tile;
#else
  return -1;
#endif
}

}  // namespace moe_ext
