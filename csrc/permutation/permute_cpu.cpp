#include "permute.h"

#include <torch/csrc/stable/library.h>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../common/stream_rows.h"
#include "../common/tensors.h"

namespace moe_ext::cpu {

Tensor permute(const Tensor& input, const Tensor& permuted_to_slot, const Tensor& slot_to_permuted, int64_t topk) {
  const RowMaps maps = check_permute(input, permuted_to_slot, slot_to_permuted, topk);
  const Tensor source = as_contiguous(input);
  const Tensor slots = as_contiguous(permuted_to_slot);
  const int64_t row_bytes = input.size(1) * static_cast<int64_t>(input.element_size());
  Tensor output = new_empty_large(input, {maps.num_rows, input.size(1)});

  const auto* source_bytes = static_cast<const char*>(source.const_data_ptr());
  const auto* slot_of_row = slots.const_data_ptr<int32_t>();
  auto* output_bytes = static_cast<char*>(output.mutable_data_ptr());
  const RowWriter writer(output_bytes, maps.num_rows, row_bytes);
  parallel_rows(maps.num_rows, row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = slot_of_row[row];
      char* destination = output_bytes + row * row_bytes;
      if (slot >= 0 && slot < maps.num_slots) {
        writer.copy(destination, source_bytes + slot / topk * row_bytes);
      } else {
        writer.zero(destination);
      }
    }
    writer.finish();
  });
  return output;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("permute", TORCH_BOX(&moe_ext::cpu::permute)); }
