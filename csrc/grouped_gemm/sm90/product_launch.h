// The host side of product_kernel.h: tensor maps, grid, launch. One explicit instantiation per generated file.
#pragma once

#include "../grouped_gemm_kernels.h"
#include "product_kernel.h"
#include "products.h"

namespace moe_ext::sm90 {

template <typename Element>
constexpr MapType map_type() {
  if constexpr (std::is_same_v<Element, float>) {
    return MapType::kFloat32;
  } else {
    return std::is_same_v<Element, BFloat16> ? MapType::kBFloat16 : MapType::kFloat16;
  }
}

template <typename Config>
const char* launch(const ProductArguments& arguments, int64_t tiles, int multiprocessors, cudaStream_t stream) {
  const auto kernel = product_kernel<Config>;
#ifndef MOE_EXT_EMULATED
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int{Config::kSharedBytes}));
#endif
  launch_kernel(kernel, static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors)), kProductThreads,
                Config::kSharedBytes, stream, arguments);
  return nullptr;
}

template <typename Config>
const char* launch_forward(const GroupedGemmArgs& args, int multiprocessors) {
  static_assert(!Config::kWgrad);
  constexpr MapType kType = map_type<typename Config::Element>();
  const int64_t m = args.max_rows, n = args.n, k = args.k;
  ProductArguments arguments{};
  const TensorMapSpec a = {args.input, kType, 2, {k, m}, {1, k}, {kBlockDepth, Config::kBoxA}};
  const TensorMapSpec b = Config::kMajorB == Major::kK
                              ? TensorMapSpec{args.weight, kType, 3, {k, n, args.num_experts}, {1, k, n * k},
                                              {kBlockDepth, Config::kBoxB, 1}}
                              : TensorMapSpec{args.weight, kType, 3, {n, k, args.num_experts}, {1, n, n * k},
                                              {Config::kBoxB, kBlockDepth, 1}};
  const TensorMapSpec d = {args.output, kType, 3, {n, 1, m}, {1, n, n}, {kRowBytes / 2, 1, kPieceRows}};
  for (const auto& [map, spec] : {std::pair{&arguments.a, &a}, {&arguments.b, &b}, {&arguments.d, &d}}) {
    if (const char* error = encode_tensor_map(map, *spec)) return error;
  }
  arguments.expert_offsets = args.expert_offsets;
  arguments.num_experts = args.num_experts;
  arguments.max_rows = m;
  arguments.columns = n;
  arguments.depth = k;
  arguments.output = args.output;
  const int64_t tiles = row_tile_bound(m, args.num_experts, Config::kRows) * ceil_div(n, Config::kColumns);
  return launch<Config>(arguments, tiles, multiprocessors, args.stream);
}

template <typename Config>
const char* launch_wgrad(const GroupedWgradArgs& args, int multiprocessors) {
  static_assert(Config::kWgrad);
  constexpr MapType kType = map_type<typename Config::Element>();
  constexpr int kOutputBytes = sizeof(typename Config::Output);
  const bool enk = args.layout == WeightLayout::kENK;
  const int64_t m = args.max_rows, rows = enk ? args.n : args.k, columns = enk ? args.k : args.n;
  ProductArguments arguments{};
  const TensorMapSpec a = {enk ? args.grad_output : args.input, kType, 2, {rows, m}, {1, rows}, {64, kBlockDepth}};
  const TensorMapSpec b = {enk ? args.input : args.grad_output, kType, 2, {columns, m}, {1, columns},
                           {64, kBlockDepth}};
  const TensorMapSpec d = {args.grad_weight, map_type<typename Config::Output>(), 3,
                           {columns, rows, args.num_experts}, {1, columns, rows * columns},
                           {kRowBytes / kOutputBytes, kPieceRows, 1}};
  for (const auto& [map, spec] : {std::pair{&arguments.a, &a}, {&arguments.b, &b}, {&arguments.d, &d}}) {
    if (const char* error = encode_tensor_map(map, *spec)) return error;
  }
  arguments.expert_offsets = args.expert_offsets;
  arguments.num_experts = args.num_experts;
  arguments.max_rows = m;
  arguments.rows = rows;
  arguments.columns = columns;
  const int64_t tiles = args.num_experts * ceil_div(rows, Config::kRows) * ceil_div(columns, Config::kColumns);
  return launch<Config>(arguments, tiles, multiprocessors, args.stream);
}

}  // namespace moe_ext::sm90
