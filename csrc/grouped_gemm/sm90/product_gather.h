// The producer of product_kernel.h where an operand's rows are gathered: its four warps copy that operand by 16-byte
// cp.async into the swizzled layout, while the other operand still comes by TMA.
//
// A stage's copies are published up to two stages later: then cp.async.wait_group leaves the later ones in flight, and
// a thread's arrival follows its own fence. Where a thread must wait anyway, for a free stage or for its next tile, it
// publishes sooner. Two stages are published and unconsumed whenever it waits for a free one, which the math warpgroups
// need to release any.
#pragma once

#include "product_kernel.h"

namespace moe_ext::sm90 {

constexpr int kRowsAtOnce = kWarpgroup / kRowChunks;  // a thread copies chunk t % 8 of rows t / 8, t / 8 + 16, ...
static_assert(kRowsAtOnce % 8 == 0, "so a thread's rows are all swizzled alike");
constexpr int kCopiesAhead = 2;

// The slots of every kRowsAtOnce-th row from `row` on, -1 past `end`. All are asked for before one is used.
template <int count>
__device__ void load_slots(const RowGather& gather, int64_t row, int64_t end, int (&slots)[count]) {
  const int32_t* first = gather.permuted_to_slot + row;
  const int64_t left = end - row;
#pragma unroll
  for (int i = 0; i < count; ++i) slots[i] = i * kRowsAtOnce < left ? first[i * kRowsAtOnce] : -1;
}

// From column `column` on, by one multiplication: a row's bytes fit 32 bits, since TMA counts its elements in an
// int32_t. Without a token that of row 0, not to be read.
template <typename Element>
__device__ const Element* row_of(const RowGather& gather, int token, int64_t column) {
  const auto row_bytes = static_cast<uint32_t>(gather.width * sizeof(Element));
  const char* first = static_cast<const char*>(gather.source) + column * sizeof(Element);
  return reinterpret_cast<const Element*>(first + uint64_t{static_cast<uint32_t>(token < 0 ? 0 : token)} * row_bytes);
}

// Copies of rows of A, K-major: a row's token is looked up once per tile.
template <typename Config>
struct GatherFeatures {
  static constexpr int kRowsPerThread = Config::kRows / kRowsAtOnce;
  int tokens[kRowsPerThread];

  __device__ void start(const ProductArguments& arguments, const Work& work) {
    load_slots(arguments.gather, work.row + threadIdx.x / kRowChunks, work.row_end, tokens);
#pragma unroll
    for (int& token : tokens) token = arguments.gather.token_of(token);
  }
  __device__ void copy(const ProductArguments& arguments, const Work& work, int64_t depth, char* a, char* b) const {
    const int chunk = threadIdx.x % kRowChunks;
    const int64_t first = depth + chunk * 8;
    char* target = a + swizzled(threadIdx.x / kRowChunks, chunk * 16);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      copy_async_16(target + i * kRowsAtOnce * kRowBytes,
                    row_of<typename Config::Element>(arguments.gather, tokens[i], first),
                    tokens[i] >= 0 && first < arguments.depth);
    }
  }
};

// Copies along the depth of an MN-major operand: rows of the matrix are the source's columns.
template <typename Config>
struct GatherExpertRows {
  using Element = typename Config::Element;
  static constexpr int kStepsPerThread = kBlockDepth / kRowsAtOnce;
  int slots[kStepsPerThread];  // of the next stage: on their way while this one is copied

  __device__ void start(const ProductArguments& arguments, const Work& work) { look_up(arguments, work, work.depth); }
  __device__ void copy(const ProductArguments& arguments, const Work& work, int64_t depth, char* a, char* b) {
    int tokens[kStepsPerThread];
#pragma unroll
    for (int i = 0; i < kStepsPerThread; ++i) tokens[i] = arguments.gather.token_of(slots[i]);
    look_up(arguments, work, depth + kBlockDepth);
    if (arguments.gather.is_a) {
      copy_blocks<Config::kRows / 64>(arguments.gather, tokens, work.row, a);
    } else {
      copy_blocks<Config::kColumns / 64>(arguments.gather, tokens, work.column, b);
    }
  }

 private:
  __device__ void look_up(const ProductArguments& arguments, const Work& work, int64_t depth) {
    load_slots(arguments.gather, depth + threadIdx.x / kRowChunks, work.depth_end, slots);
  }
  template <int blocks>
  __device__ static void copy_blocks(const RowGather& gather, const int (&tokens)[kStepsPerThread],
                                     int64_t first_column, char* operand) {
    const int chunk = threadIdx.x % kRowChunks;
    const int64_t column = first_column + chunk * 8;
    char* target = operand + swizzled(threadIdx.x / kRowChunks, chunk * 16);
#pragma unroll
    for (int i = 0; i < kStepsPerThread; ++i) {
      const Element* row = row_of<Element>(gather, tokens[i], column);
#pragma unroll
      for (int block = 0; block < blocks; ++block) {
        copy_async_16(target + block * kBlockBytes + i * kRowsAtOnce * kRowBytes, row + block * 64,
                      tokens[i] >= 0 && column + block * 64 < gather.width);
      }
    }
  }
};

// Stages whose copies this thread has started and not published.
template <typename Config>
struct Unpublished {
  const SharedMemory<Config>& shared;
  RingPosition<Config::kStages> oldest;
  int count;

  // Once their copies have landed, all but the last `kept`.
  template <int kept>
  __device__ void publish_but() {
    copy_async_wait<kept>();
#pragma unroll 1
    for (; count > kept; --count, oldest.advance()) {
      fence_proxy_async();
      barrier_arrive(&shared.full[oldest.stage]);
    }
  }
};

template <typename Config>
__device__ void produce_gathered(const ProductArguments& arguments, const SharedMemory<Config>& shared) {
  using Gather = std::conditional_t<Config::kWgrad, GatherExpertRows<Config>, GatherFeatures<Config>>;
  static_assert(Config::kStages - kCopiesAhead >= 2);
  RingPosition<Config::kStages> position;
  Unpublished<Config> unpublished{shared, position, 0};
  Gather gather;
  WorkQueue<Config> queue(arguments);
  for (Work work; queue.next(&work); unpublished.template publish_but<1>()) {
    gather.start(arguments, work);
    unpublished.template publish_but<0>();
    const int steps = work.steps();
#pragma unroll 1
    for (int step = 0; step < steps; ++step, position.advance()) {
      const int64_t depth = work.depth + int64_t{step} * kBlockDepth;
      char *a = shared.a(position.stage), *b = shared.b(position.stage);
      Barrier* empty = &shared.empty[position.stage];
      if (!barrier_passed(empty, position.phase ^ 1)) unpublished.template publish_but<1>();
      barrier_wait(empty, position.phase ^ 1);
      if (threadIdx.x == 0) {
        Barrier* full = &shared.full[position.stage];
        const bool gathers_a = !Config::kWgrad || arguments.gather.is_a;
        barrier_arrive_expect(full, gathers_a ? Config::kBytesB : Config::kBytesA);
        gathers_a ? load_b<Config>(arguments, work, depth, b, full) : load_a<Config>(arguments, work, depth, a, full);
      }
      gather.copy(arguments, work, depth, a, b);
      copy_async_commit();
      ++unpublished.count;
      unpublished.template publish_but<kCopiesAhead>();
    }
  }
  unpublished.template publish_but<0>();
}

}  // namespace moe_ext::sm90
