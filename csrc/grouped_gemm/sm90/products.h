// The compiled sm_90a products, by name: <product>_<dtype>_<tile>. cmake/GroupedGemmKernels.cmake writes one file for
// each dtype and tile; a name that stands here and not there does not link.
#pragma once

#include "../grouped_gemm_kernels.h"

namespace moe_ext::sm90 {

// nullptr, or what went wrong.
using ForwardLaunch = const char* (*)(const GroupedGemmArgs&, int multiprocessors);
using WgradLaunch = const char* (*)(const GroupedWgradArgs&, int multiprocessors);

#define MOE_DECLARE_PRODUCTS(dtype, tile)                                                      \
  const char* forward_enk_##dtype##_##tile(const GroupedGemmArgs& args, int multiprocessors); \
  const char* forward_ekn_##dtype##_##tile(const GroupedGemmArgs& args, int multiprocessors); \
  const char* wgrad_##dtype##_##tile(const GroupedWgradArgs& args, int multiprocessors);      \
  const char* wgrad_fp32_##dtype##_##tile(const GroupedWgradArgs& args, int multiprocessors);
#define MOE_DECLARE_TILE(tile) MOE_DECLARE_PRODUCTS(bf16, tile) MOE_DECLARE_PRODUCTS(fp16, tile)
MOE_DECLARE_TILE(128x256) MOE_DECLARE_TILE(128x128) MOE_DECLARE_TILE(64x256)
#undef MOE_DECLARE_TILE
#undef MOE_DECLARE_PRODUCTS

struct Products {
  ForwardLaunch forward_enk, forward_ekn;
  WgradLaunch wgrad, wgrad_fp32;
};

// [bf16, fp16] of each tile, in the order of kSm90Tiles.
#define MOE_PRODUCTS(dtype, tile) \
  { forward_enk_##dtype##_##tile, forward_ekn_##dtype##_##tile, wgrad_##dtype##_##tile, wgrad_fp32_##dtype##_##tile }
#define MOE_TILE(tile) \
  { MOE_PRODUCTS(bf16, tile), MOE_PRODUCTS(fp16, tile) }
inline constexpr Products kProducts[][2] = {MOE_TILE(128x256), MOE_TILE(128x128), MOE_TILE(64x256)};
#undef MOE_TILE
#undef MOE_PRODUCTS

inline const Products& products_of(int tile, GemmDtype dtype) {
  return kProducts[tile][dtype == GemmDtype::kBFloat16 ? 0 : 1];
}

}  // namespace moe_ext::sm90
