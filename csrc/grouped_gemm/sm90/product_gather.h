// The producer of product_kernel.h where an operand's rows are gathered: its four warps copy that operand by 16-byte
// cp.async into the swizzled layout, while the other operand still comes by TMA.
//
// A stage's copies are published two stages later: then cp.async.wait_group leaves the later ones in flight, and a
// thread's arrival follows its own fence. Two stages stay published and unconsumed at least, which the math warpgroups
// need to release any.
#pragma once

#include "product_kernel.h"

namespace moe_ext::sm90 {

constexpr int kRowsAtOnce = kWarpgroup / kRowChunks;  // a thread copies chunk t % 8 of rows t / 8, t / 8 + 16, ...
constexpr int kCopiesAhead = 2;

// Copies of rows of A, K-major: a row's token is looked up once per tile.
template <typename Config>
struct GatherFeatures {
  static constexpr int kRowsPerThread = Config::kRows / kRowsAtOnce;
  int tokens[kRowsPerThread];

  __device__ void start(const ProductArguments& arguments, const Work& work) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int64_t row = work.row + threadIdx.x / kRowChunks + i * kRowsAtOnce;
      tokens[i] = row < work.row_end ? arguments.gather.token_of(row) : -1;
    }
  }
  __device__ void copy(const ProductArguments& arguments, const Work& work, int64_t depth, char* a, char* b) const {
    using Element = typename Config::Element;
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const auto* source = static_cast<const Element*>(arguments.gather.source);
    const int64_t first = depth + chunk * 8;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const bool held = tokens[i] >= 0 && first < arguments.depth;
      copy_async_16(a + swizzled(row + i * kRowsAtOnce, chunk * 16),
                    held ? source + tokens[i] * arguments.gather.width + first : source, held);
    }
  }
};

// Copies along the depth of an MN-major operand: rows of the matrix are the source's columns.
template <typename Config>
struct GatherExpertRows {
  static constexpr int kStepsPerThread = kBlockDepth / kRowsAtOnce;

  __device__ void start(const ProductArguments& arguments, const Work& work) {}
  __device__ void copy(const ProductArguments& arguments, const Work& work, int64_t depth, char* a, char* b) const {
    using Element = typename Config::Element;
    const RowGather& gather = arguments.gather;
    const int blocks = (gather.is_a ? Config::kRows : Config::kColumns) / 64;
    const int step = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const int64_t column = (gather.is_a ? work.row : work.column) + chunk * 8;
    const auto* source = static_cast<const Element*>(gather.source);
#pragma unroll
    for (int i = 0; i < kStepsPerThread; ++i) {
      const int64_t row = depth + step + i * kRowsAtOnce;
      const int token = row < work.depth_end ? gather.token_of(row) : -1;
      char* target = (gather.is_a ? a : b) + swizzled(step + i * kRowsAtOnce, chunk * 16);
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        const bool held = token >= 0 && column + block * 64 < gather.width;
        copy_async_16(target + block * kBlockBytes, held ? source + token * gather.width + column + block * 64 : source,
                      held);
      }
    }
  }
};

template <typename Config>
__device__ void produce_gathered(const ProductArguments& arguments, const SharedMemory<Config>& shared) {
  using Gather = std::conditional_t<Config::kWgrad, GatherExpertRows<Config>, GatherFeatures<Config>>;
  static_assert(Config::kStages - kCopiesAhead >= 2);
  RingPosition<Config::kStages> position, unpublished;
  const auto publish = [&] {
    fence_proxy_async();
    barrier_arrive(&shared.full[unpublished.stage]);
    unpublished.advance();
  };
  int ahead = 0;
  Gather gather;
  WorkQueue<Config> queue(arguments);
  for (Work work; queue.next(&work);) {
    gather.start(arguments, work);
    const int steps = work.steps();
#pragma unroll 1
    for (int step = 0; step < steps; ++step, position.advance()) {
      const int64_t depth = work.depth + int64_t{step} * kBlockDepth;
      char *a = shared.a(position.stage), *b = shared.b(position.stage);
      barrier_wait(&shared.empty[position.stage], position.phase ^ 1);
      if (threadIdx.x == 0) {
        Barrier* full = &shared.full[position.stage];
        const bool gathers_a = !Config::kWgrad || arguments.gather.is_a;
        barrier_arrive_expect(full, gathers_a ? Config::kBytesB : Config::kBytesA);
        gathers_a ? load_b<Config>(arguments, work, depth, b, full) : load_a<Config>(arguments, work, depth, a, full);
      }
      gather.copy(arguments, work, depth, a, b);
      copy_async_commit();
      if (ahead == kCopiesAhead) {
        copy_async_wait<kCopiesAhead>();
        publish();
      } else {
        ++ahead;
      }
    }
  }
  copy_async_wait<0>();
  for (; ahead > 0; --ahead) publish();
}

}  // namespace moe_ext::sm90
