// The host side of product_kernel.h: tensor maps, grid, launch. One explicit instantiation per generated file.
#pragma once

#include <initializer_list>
#include <utility>

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

// Before anything else: it also binds the device's context to this thread, if it is the thread's first use of CUDA, and
// encoding a tensor map needs that.
template <typename Config>
void prepare() {
  allow_shared_bytes(product_kernel<Config>, Config::kSharedBytes);
}

// `tiles`: of clusters.
template <typename Config>
const char* launch(const ProductArguments& arguments, int64_t tiles, int multiprocessors, cudaStream_t stream) {
  const auto kernel = product_kernel<Config>;
  const int64_t clusters = std::min<int64_t>(tiles, std::max(multiprocessors / Config::kCluster, 1));
  const auto blocks = static_cast<unsigned>(clusters * Config::kCluster);
  if constexpr (Config::kCluster == 1) {
    launch_kernel(kernel, blocks, kProductThreads, Config::kSharedBytes, stream, arguments);
  } else {
    launch_clusters(kernel, blocks, kProductThreads, Config::kCluster, Config::kSharedBytes, stream, arguments);
  }
  return nullptr;
}

inline const char* encode(std::initializer_list<std::pair<TensorMap*, TensorMapSpec>> maps) {
  for (const auto& [map, spec] : maps) {
    if (const char* error = encode_tensor_map(map, spec)) return error;
  }
  return nullptr;
}

template <typename Config>
const char* launch_forward(const FusedGemmArgs& fused, int multiprocessors) {
  static_assert(!Config::kWgrad);
  constexpr MapType kType = map_type<typename Config::Element>();
  const GroupedGemmArgs& args = fused.gemm;
  const int64_t m = args.max_rows, n = args.n, k = args.k, e = args.num_experts;
  const int64_t columns = Config::kPairsColumns ? n / 2 : n;
  const TensorMapSpec weights_k = {args.weight, kType, 3, {k, n, e}, {1, k, n * k}, {kBlockDepth, Config::kBoxB, 1}};
  const TensorMapSpec weights_mn = {args.weight, kType, 3, {n, k, e}, {1, n, n * k}, {Config::kBoxB, kBlockDepth, 1}};
  prepare<Config>();
  ProductArguments arguments{};
  const char* error = encode({{&arguments.b, Config::kMajorB == Major::kK ? weights_k : weights_mn}});
  if (!error && !fused.gather.source) {
    error = encode({{&arguments.a, {args.input, kType, 2, {k, m}, {1, k}, {kBlockDepth, Config::kBoxA}}}});
  }
  if (!error && args.output) {
    error =
        encode({{&arguments.d,
                 {args.output, kType, 3, {columns, n / columns, m}, {1, columns, n}, {kRowBytes / 2, 1, kPieceRows}}}});
  }
  if (error) return error;
  arguments.expert_offsets = args.expert_offsets;
  arguments.num_experts = e;
  arguments.max_rows = m;
  arguments.columns = columns;
  arguments.depth = k;
  arguments.output = args.output;
  arguments.bias = fused.bias;
  arguments.gather = fused.gather;
  arguments.activation = fused.activation;
  arguments.activated = fused.activated;
  arguments.differentiation = fused.differentiation;
  const int64_t tiles = row_tile_bound(m, e, Config::kClusterRows) * ceil_div(columns, Config::kTileColumns);
  return launch<Config>(arguments, tiles, multiprocessors, args.stream);
}

template <typename Config>
const char* launch_wgrad(const GroupedWgradArgs& args, const RowGather& gather, int multiprocessors) {
  static_assert(Config::kWgrad);
  constexpr MapType kType = map_type<typename Config::Element>();
  constexpr int kOutputBytes = sizeof(typename Config::Output);
  const bool enk = args.layout == WeightLayout::kENK;
  const int64_t m = args.max_rows, rows = enk ? args.n : args.k, columns = enk ? args.k : args.n, e = args.num_experts;
  const void* a = enk ? args.grad_output : args.input;
  const void* b = enk ? args.input : args.grad_output;
  prepare<Config>();
  ProductArguments arguments{};
  arguments.gather = gather;
  arguments.gather.is_a = !enk;  // the input
  const char* error = encode({{&arguments.d,
                               {args.grad_weight,
                                map_type<typename Config::Output>(),
                                3,
                                {columns, rows, e},
                                {1, columns, rows * columns},
                                {kRowBytes / kOutputBytes, kPieceRows, 1}}}});
  if (!error && (enk || !gather.source)) {
    error = encode({{&arguments.a, {a, kType, 2, {rows, m}, {1, rows}, {64, kBlockDepth}}}});
  }
  if (!error && (!enk || !gather.source)) {
    error = encode({{&arguments.b, {b, kType, 2, {columns, m}, {1, columns}, {64, kBlockDepth}}}});
  }
  if (error) return error;
  arguments.expert_offsets = args.expert_offsets;
  arguments.trainable_experts = args.trainable_experts;
  arguments.num_experts = e;
  arguments.max_rows = m;
  arguments.rows = rows;
  arguments.columns = columns;
  const int64_t tiles = e * ceil_div(rows, Config::kClusterRows) * ceil_div(columns, Config::kColumns);
  return launch<Config>(arguments, tiles, multiprocessors, args.stream);
}

}  // namespace moe_ext::sm90
