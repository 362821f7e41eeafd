// How an expert's weight lies. Plain C++, for the CPU kernels and the CUDA launchers.
#pragma once

namespace moe_ext {

// E experts, N output features, K input features. ENK: weight[e] is [N, K] row-major, the layout of torch.nn.Linear.
// EKN: [K, N] row-major, gpt-oss's.
enum class WeightLayout { kENK, kEKN };

inline WeightLayout transposed(WeightLayout layout) {
  return layout == WeightLayout::kENK ? WeightLayout::kEKN : WeightLayout::kENK;
}

}  // namespace moe_ext
