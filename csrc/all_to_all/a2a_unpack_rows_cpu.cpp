#include "a2a_unpack_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../common/stream_rows.h"
#include "../common/tensors.h"
#include "fp8_block.h"

namespace moe_ext::cpu {
namespace {

const float* e4m3_values() {
  static const auto table = [] {
    std::array<float, 256> values;
    for (int bits = 0; bits < 256; ++bits) values[bits] = from_e4m3(static_cast<uint8_t>(bits));
    return values;
  }();
  return table.data();
}

template <typename scalar_t>
MOE_CPU_CLONES void scale_block(const uint8_t* source, const float* values, float scale, int64_t count,
                                scalar_t* output) {
  for (int64_t i = 0; i < count; ++i) output[i] = static_cast<scalar_t>(values[source[i]] * scale);
}

template <typename scalar_t>
void read_payload(const char* bytes, const PackedRow& row, scalar_t* output, const RowWriter& writer) {
  if (row.scales == 0) return writer.copy(output, bytes);
  for (int64_t block = 0; block < row.scales; ++block) {
    float scale = 0;
    std::memcpy(&scale, bytes + row.scales_at + block * sizeof(float), sizeof(float));
    const int64_t first = block * kScaleBlock;
    scale_block(reinterpret_cast<const uint8_t*>(bytes) + first, e4m3_values(), scale,
                std::min(kScaleBlock, row.hidden_size - first), output + first);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> a2a_unpack_rows(const Tensor& rows, int64_t hidden_size, int64_t topk,
                                                   ScalarType dtype, std::string payload, bool weighted) {
  const PackedRow row = check_a2a_unpack_rows(rows, hidden_size, topk, dtype, payload, weighted);
  const int64_t num_rows = rows.size(0);
  const Tensor source = as_contiguous(rows);
  Tensor hidden = new_empty_large(rows, {num_rows, hidden_size}, dtype);
  Tensor ids = make_tensor(rows, {num_rows, topk}, ScalarType::Int);
  Tensor weights = make_tensor(rows, {weighted ? num_rows : 0, topk}, router_dtype(dtype));
  dispatch_floating(dtype, "dtype", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto* input = static_cast<const char*>(source.const_data_ptr());
    auto* hidden_out = hidden.mutable_data_ptr<scalar_t>();
    auto* id_out = ids.mutable_data_ptr<int32_t>();
    auto* weight_out = static_cast<char*>(weights.mutable_data_ptr());
    const RowWriter writer(hidden_out, num_rows, hidden_size * static_cast<int64_t>(sizeof(scalar_t)));
    parallel_rows(num_rows, row.row_bytes + hidden_size * static_cast<int64_t>(sizeof(scalar_t)),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t m = begin; m < end; ++m) {
                      const char* bytes = input + m * row.row_bytes;
                      read_payload(bytes, row, hidden_out + m * hidden_size, writer);
                      std::memcpy(id_out + m * topk, bytes + row.ids_at, topk * sizeof(int32_t));
                      if (weighted) {
                        std::memcpy(weight_out + m * topk * row.weight_bytes, bytes + row.weights_at,
                                    topk * row.weight_bytes);
                      }
                    }
                    writer.finish();
                  });
  });
  return {hidden, ids, weights};
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_unpack_rows", TORCH_BOX(&moe_ext::cpu::a2a_unpack_rows)); }
