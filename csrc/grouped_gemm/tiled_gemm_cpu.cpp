#include "tiled_gemm.h"

#include <algorithm>

#include "../common/stream_rows.h"
#include "cpu/tile_queue.h"

namespace moe_ext::cpu {

void tiled_gemm(const std::vector<GemmProblem>& problems, ScalarType dtype, ScalarType output_dtype) {
  const GemmKernels& kernels = choose_kernels(dtype, output_dtype);
  const auto work = [&](size_t i) {
    const GemmProblem& p = problems[i];
    return p.left.rows * p.left.cols * p.right.cols;
  };
  std::vector<size_t> order(problems.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return work(a) > work(b); });
  TileQueue queue;
  int64_t output_bytes = 0, multiply_adds = 0;
  for (size_t i : order) {
    const GemmProblem& p = problems[i];
    multiply_adds += work(i);
    output_bytes += p.left.rows * p.right.cols * kernels.output_bytes;
    const TileGrid grid({p.left, p.right}, static_cast<int64_t>(problems.size()), kernels);
    queue.add(0, static_cast<int32_t>(i), grid, TileQueue::kNone, TileQueue::kNone);
  }
  const bool stream = output_bytes >= kStreamedBytes;
  queue.run(multiply_adds, [&](const TileQueue::Task& task) {
    const GemmProblem& p = problems[task.group];
    multiply_tile({p.left, p.right}, task.tile, kernels, Output{p.output, p.bias, stream});
  });
}

}  // namespace moe_ext::cpu
