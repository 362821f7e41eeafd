// The compiled sm_90a products. cmake/GroupedGemmKernels.cmake writes the files that define these tables, one or two
// for each dtype and tile; a table that stands here and not there does not link.
#pragma once

#include "../fused_gemm.h"

namespace moe_ext::sm90 {

// nullptr, or what went wrong.
using ForwardLaunch = const char* (*)(const FusedGemmArgs&, int multiprocessors);
using WgradLaunch = const char* (*)(const GroupedWgradArgs&, const RowGather&, int multiprocessors);

struct Products {
  ForwardLaunch store[2];  // by WeightLayout
  WgradLaunch wgrad, wgrad_fp32;
};
// By RowMode, then WeightLayout.
using FusedProducts = ForwardLaunch[3][2];

#define MOE_DECLARE_TILE(tile)                                      \
  extern const Products products_bf16_##tile, products_fp16_##tile; \
  extern const FusedProducts activated_bf16_##tile, activated_fp16_##tile;
MOE_DECLARE_TILE(128x256)
MOE_DECLARE_TILE(128x128)
MOE_DECLARE_TILE(64x256)
MOE_DECLARE_TILE(128x256x2)
#undef MOE_DECLARE_TILE
extern const FusedProducts differentiated_bf16_128x128, differentiated_fp16_128x128;

// `tile`: a row of kSm90Tiles.
inline const Products& products_of(int tile, GemmDtype dtype) {
  const Products* const products[][2] = {{&products_bf16_128x256, &products_fp16_128x256},
                                         {&products_bf16_128x128, &products_fp16_128x128},
                                         {&products_bf16_64x256, &products_fp16_64x256},
                                         {&products_bf16_128x256x2, &products_fp16_128x256x2}};
  return *products[tile][dtype == GemmDtype::kBFloat16 ? 0 : 1];
}

inline const FusedProducts& activated_of(int tile, GemmDtype dtype) {
  const FusedProducts* const products[][2] = {{&activated_bf16_128x256, &activated_fp16_128x256},
                                              {&activated_bf16_128x128, &activated_fp16_128x128},
                                              {&activated_bf16_64x256, &activated_fp16_64x256},
                                              {&activated_bf16_128x256x2, &activated_fp16_128x256x2}};
  return *products[tile][dtype == GemmDtype::kBFloat16 ? 0 : 1];
}

inline const FusedProducts& differentiated_of(GemmDtype dtype) {
  return dtype == GemmDtype::kBFloat16 ? differentiated_bf16_128x128 : differentiated_fp16_128x128;
}

}  // namespace moe_ext::sm90
