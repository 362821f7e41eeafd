// From tensors to the plain arguments of grouped_gemm_kernels.h.
#pragma once

#include "../common/dtypes.h"
#include "../common/row_maps.h"
#include "../common/tensors.h"
#include "fused_gemm.h"
#include "grouped_gemm_kernels.h"

namespace moe_ext {

inline GemmDtype gemm_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return GemmDtype::kFloat32;
    case ScalarType::BFloat16: return GemmDtype::kBFloat16;
    case ScalarType::Half: return GemmDtype::kFloat16;
    default:
      MOE_CHECK(false, name, ": expected float32, bfloat16 or float16 on CUDA, got ", dtype_name(tensor.scalar_type()));
  }
}

inline void check_launched(const char* op, const char* message) {
  MOE_CHECK(!message, op, ": the kernel was not launched: ", message);
}

// Device memory that lives as long as the launch needs it: the caching allocator reuses it in stream order.
struct Workspace {
  Tensor memory;
  void* start;

  Workspace(const Tensor& like, int64_t num_experts) {
    constexpr size_t kAlignment = 128;
    const size_t bytes = grouped_gemm_workspace_bytes(num_experts, like.get_device_index());
    memory = make_tensor(like, {static_cast<int64_t>(bytes + kAlignment)}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    start = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
};

// `tokens` [num_tokens, width] and `permuted_to_slot` contiguous.
inline RowGather row_gather(const Tensor& tokens, const Tensor& permuted_to_slot, const RowMaps& maps) {
  return {tokens.const_data_ptr(), permuted_to_slot.const_data_ptr<int32_t>(),
          tokens.size(1),          static_cast<int>(maps.num_slots),
          divisor_of(maps.topk),   true};
}

// A weight as the kernels take it. One whose transpose is contiguous is read under the other layout, without a copy.
struct StoredWeight {
  Tensor weight;
  WeightLayout layout;

  StoredWeight(const Tensor& given, WeightLayout given_layout) : weight(given), layout(given_layout) {
    if (given.is_contiguous()) return;
    const Tensor other = torch::stable::transpose(given, 1, 2);
    weight = other.is_contiguous() ? other : as_contiguous(given);
    if (other.is_contiguous()) layout = transposed(given_layout);
  }
};

}  // namespace moe_ext
