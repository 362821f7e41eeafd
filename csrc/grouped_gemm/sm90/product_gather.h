// The producer of product_kernel.h where an operand's rows are gathered: its four warps copy that operand by 16-byte
// cp.async into the swizzled layout, while the other operand still comes by TMA.
// A thread's copies arrive at the stage's barrier by themselves, so that it never waits for one; the fence between them
// and wgmma is the reader's.
#pragma once

#include "product_kernel.h"

namespace moe_ext::sm90 {

// The slots of every kRowsAtOnce-th row from `row` on, -1 past `end`. All are asked for before one is used.
template <int count>
__device__ void load_slots(const RowGather& gather, int64_t row, int64_t end, int (&slots)[count]) {
  const int32_t* first = gather.permuted_to_slot + row;
  const int64_t left = end - row;
#pragma unroll
  for (int i = 0; i < count; ++i) slots[i] = i * kRowsAtOnce < left ? first[i * kRowsAtOnce] : -1;
}

// From column `column` on, by one multiplication: columns and a row's bytes fit 32 bits, since TMA counts elements in
// an int32_t. Without a token that of row 0, not to be read.
template <typename Element>
__device__ const Element* row_of(const RowGather& gather, int token, int column) {
  const auto row_bytes = static_cast<uint32_t>(gather.width * sizeof(Element));
  const char* first =
      static_cast<const char*>(gather.source) + static_cast<uint32_t>(column) * static_cast<uint32_t>(sizeof(Element));
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
  __device__ void copy(const ProductArguments& arguments, const Work& work, int depth, char* a, char* b) const {
    const int chunk = threadIdx.x % kRowChunks;
    const int first = depth + chunk * 8;
    char* target = a + swizzled(threadIdx.x / kRowChunks, chunk * 16);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      copy_async_16(target + i * kRowsAtOnce * kRowBytes,
                    row_of<typename Config::Element>(arguments.gather, tokens[i], first),
                    tokens[i] >= 0 && first < static_cast<int>(arguments.depth));
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
  __device__ void copy(const ProductArguments& arguments, const Work& work, int depth, char* a, char* b) {
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
  __device__ void look_up(const ProductArguments& arguments, const Work& work, int depth) {
    load_slots(arguments.gather, depth + threadIdx.x / kRowChunks, work.depth_end, slots);
  }
  template <int blocks>
  __device__ static void copy_blocks(const RowGather& gather, const int (&tokens)[kStepsPerThread], int first_column,
                                     char* operand) {
    const int chunk = threadIdx.x % kRowChunks;
    const int column = first_column + chunk * 8;
    char* target = operand + swizzled(threadIdx.x / kRowChunks, chunk * 16);
#pragma unroll
    for (int i = 0; i < kStepsPerThread; ++i) {
      const Element* row = row_of<Element>(gather, tokens[i], column);
#pragma unroll
      for (int block = 0; block < blocks; ++block) {
        copy_async_16(target + block * kBlockBytes + i * kRowsAtOnce * kRowBytes, row + block * 64,
                      tokens[i] >= 0 && column + block * 64 < static_cast<int>(gather.width));
      }
    }
  }
};

template <typename Config>
__device__ void produce_gathered(const ProductArguments& arguments, const SharedMemory<Config>& shared) {
  using Gather = std::conditional_t<Config::kWgrad, GatherExpertRows<Config>, GatherFeatures<Config>>;
  RingPosition<Config::kStages> position;
  Gather gather;
  WorkQueue<Config> queue(arguments);
  for (Work work; queue.next(&work);) {
    gather.start(arguments, work);
    const int steps = work.steps();
#pragma unroll 1
    for (int step = 0; step < steps; ++step, position.advance()) {
      const int depth = work.depth + step * kBlockDepth;
      char *a = shared.a(position.stage), *b = shared.b(position.stage);
      Barrier* full = &shared.full[position.stage];
      barrier_wait(&shared.empty[position.stage], position.phase ^ 1);
      if (threadIdx.x == 0) {
        const bool gathers_a = !Config::kWgrad || arguments.gather.is_a;
        barrier_arrive_expect(full, gathers_a ? Config::kBytesB : Config::kBytesA);
        gathers_a ? load_b<Config>(arguments, work, depth, b, full) : load_a<Config>(arguments, work, depth, a, full);
      }
      gather.copy(arguments, work, depth, a, b);
      copy_async_arrive(full);
    }
  }
  copy_async_wait_all();
}

}  // namespace moe_ext::sm90
