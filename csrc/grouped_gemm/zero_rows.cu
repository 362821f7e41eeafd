// Zeroes what no grouped product writes: one write per byte zeroed.
#include "zero_rows.h"

#include "../common/cuda_launch.h"
#include "tile_scheduler.h"

namespace moe_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kZeroBlocksPerMultiprocessor = 4;

// Zeroes the rows before the first expert and past the last. `Word` is 16 bytes, or one element where rows are
// unaligned.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    zero_rows_of_no_expert_kernel(Word* __restrict__ output, const int32_t* __restrict__ expert_offsets,
                                  int64_t num_experts, int64_t max_rows, int64_t row_words) {
  const int64_t begin = rows_of_expert(expert_offsets, 0, max_rows).begin;
  const int64_t end = rows_of_expert(expert_offsets, num_experts - 1, max_rows).end;
  const int64_t head = begin * row_words, total = (begin + max_rows - (end < begin ? begin : end)) * row_words;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    output[i < head ? i : max_rows * row_words - total + i] = Word{};
  }
}

// Zeroes the gradients of experts that have no rows, or none that train; blockIdx.y splits one expert's words.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    zero_empty_kernel(Word* __restrict__ grad_weight, const int32_t* __restrict__ expert_offsets,
                      const bool* __restrict__ trainable_experts, int64_t num_experts, int64_t max_rows,
                      int64_t expert_words) {
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t expert = blockIdx.x; expert < num_experts; expert += gridDim.x) {
    const RowRange range = rows_that_train(expert_offsets, trainable_experts, expert, max_rows);
    if (range.begin != range.end) continue;
    Word* words = grad_weight + expert * expert_words;
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < expert_words; i += stride) {
      words[i] = Word{};
    }
  }
}

using Word16 = Vector<uint32_t, 4>;

}  // namespace

void zero_rows_of_no_expert(const GroupedGemmArgs& args, int multiprocessors) {
  const int64_t row_bytes = args.n * (args.dtype == GemmDtype::kFloat32 ? 4 : 2);
  void* const output = args.output;
  const unsigned blocks = multiprocessors * kZeroBlocksPerMultiprocessor;
  const bool aligned = row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(output) % 16 == 0;
  if (aligned) {
    launch_kernel(zero_rows_of_no_expert_kernel<Word16>, blocks, kThreads, 0, args.stream, static_cast<Word16*>(output),
                  args.expert_offsets, args.num_experts, args.max_rows, row_bytes / 16);
  } else {
    launch_kernel(zero_rows_of_no_expert_kernel<uint16_t>, blocks, kThreads, 0, args.stream,
                  static_cast<uint16_t*>(output), args.expert_offsets, args.num_experts, args.max_rows, row_bytes / 2);
  }
}

void zero_empty_experts(const GroupedWgradArgs& args) {
  constexpr int64_t kMaxColumns = 64;
  const int64_t words = args.n * args.k * (args.float32_output ? 4 : 2) / 16;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.num_experts, kMaxBlocks)),
                  static_cast<unsigned>(std::min(ceil_div(words, kThreads), kMaxColumns)));
  launch_kernel(zero_empty_kernel<Word16>, grid, kThreads, 0, args.stream, static_cast<Word16*>(args.grad_weight),
                args.expert_offsets, args.trainable_experts, args.num_experts, args.max_rows, words);
}

}  // namespace moe_ext
