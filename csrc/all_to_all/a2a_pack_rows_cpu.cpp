#include "a2a_pack_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "../common/stream_rows.h"
#include "../common/tensors.h"
#include "fp8_block.h"

namespace moe_ext::cpu {
namespace {

// A block in fp32, in `values`, to e4m3; returns its scale. Plain loops: they vectorise.
template <typename scalar_t>
MOE_CPU_CLONES float quantise_block(const scalar_t* source, int64_t count, uint8_t* output) {
  float values[kScaleBlock];
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(source[i]);
  for (int64_t i = count; i < kScaleBlock; ++i) values[i] = 0;
  // Magnitudes are ordered like their bits, NaN above all; unlike a maximum of floats, that of integers is vectorised.
  uint32_t largest = 0;
  for (int64_t i = 0; i < kScaleBlock; ++i) largest = std::max(largest, float_bits(values[i]) & 0x7FFFFFFFu);
  const float scale = block_scale(std::bit_cast<float>(largest));
  const BlockDivision divide(scale);
  uint8_t quantised[kScaleBlock];
  for (int64_t i = 0; i < kScaleBlock; ++i) quantised[i] = to_e4m3(divide(values[i]));
  std::memcpy(output, quantised, count);
  return scale;
}

// Every row of hidden as e4m3, and behind it its scales: quantised once, however many ranks its token goes to.
struct QuantisedRows {
  int64_t scales_at, row_bytes;
  Tensor bytes;

  QuantisedRows(const Tensor& hidden, const PackedRow& row)
      : scales_at((row.hidden_size + 3) / 4 * 4),
        row_bytes(scales_at + row.scales * 4),
        bytes(new_empty_large(hidden, {hidden.size(0), row_bytes}, ScalarType::Byte)) {
    auto* const output = bytes.mutable_data_ptr<uint8_t>();
    dispatch_floating(hidden.scalar_type(), "hidden", [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      const auto* source = hidden.const_data_ptr<scalar_t>();
      parallel_rows(hidden.size(0), row_bytes + row.hidden_size * static_cast<int64_t>(sizeof(scalar_t)),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t n = begin; n < end; ++n) {
                        uint8_t* const to = output + n * row_bytes;
                        auto* const scales = reinterpret_cast<float*>(to + scales_at);
                        for (int64_t block = 0; block < row.scales; ++block) {
                          const int64_t first = block * kScaleBlock;
                          scales[block] = quantise_block(source + n * row.hidden_size + first,
                                                         std::min(kScaleBlock, row.hidden_size - first), to + first);
                        }
                      }
                    });
    });
  }
};

}  // namespace

Tensor a2a_pack_rows(const Tensor& hidden, const Tensor& topk_ids, const std::optional<Tensor>& topk_weights,
                     const Tensor& rank_expert_offsets, const Tensor& send_offsets, const Tensor& send_to_slot,
                     const Tensor& slot_to_send, std::string payload, int64_t copies) {
  const auto [shape, row, _] = check_a2a_pack_rows(hidden, topk_ids, topk_weights, rank_expert_offsets, send_offsets,
                                                   send_to_slot, slot_to_send, payload, copies);
  const Tensor source = as_contiguous(hidden), ids = as_contiguous(topk_ids);
  const std::optional<Tensor> weights = as_contiguous(topk_weights);
  const Tensor owners = as_contiguous(rank_expert_offsets), starts = as_contiguous(send_offsets);
  const Tensor slots = as_contiguous(send_to_slot);
  const std::optional<QuantisedRows> quantised = row.scales ? std::optional(QuantisedRows(source, row)) : std::nullopt;
  const auto* const rows = static_cast<const char*>((quantised ? quantised->bytes : source).const_data_ptr());
  // A row is its elements up to a multiple of 16 bytes, which are copied, and the rest, which is put together first.
  const int64_t elements = row.hidden_size * row.element_bytes,
                copied = elements / kRowBytesAlignment * kRowBytesAlignment;
  const int64_t stride = quantised ? quantised->row_bytes : elements;
  Tensor packed = new_empty_large(hidden, {shape.num_rows, row.row_bytes}, ScalarType::Byte);
  auto* const output = static_cast<char*>(packed.mutable_data_ptr());
  const RowWriter writer(output, shape.num_rows, row.row_bytes);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    const auto* id = ids.const_data_ptr<typename decltype(index_tag)::type>();
    const auto *owner = owners.const_data_ptr<int32_t>(), *start = starts.const_data_ptr<int32_t>();
    const auto* slot_of_row = slots.const_data_ptr<int32_t>();
    const auto write_rows = [&](const auto* weight) {
      parallel_rows(shape.num_rows, row.row_bytes + stride, [&](int64_t begin, int64_t end) {
        std::vector<char> rest(row.row_bytes - copied);
        const auto put = [&](int64_t at, const void* from, int64_t bytes) {
          std::memcpy(rest.data() + at - copied, from, bytes);
        };
        for (int64_t m = begin; m < end; ++m) {
          std::fill(rest.begin(), rest.end(), 0);
          char* const bytes = output + m * row.row_bytes;
          const int64_t token = token_of_row(slot_of_row[m], shape);
          if (token >= 0) {
            const char* from = rows + token / copies * stride;
            writer.write(bytes, from, copied);
            put(copied, from + copied, elements - copied);
            if (quantised) put(row.scales_at, from + quantised->scales_at, row.scales * 4);
          } else {
            writer.zero(bytes, copied);
            const float scale = block_scale(0);
            for (int64_t block = 0; block < row.scales; ++block) put(row.scales_at + block * 4, &scale, 4);
          }
          const int rank = find_interval(start, static_cast<int>(shape.num_ranks), m);
          for (int64_t j = 0; j < shape.topk; ++j) {
            const auto entry = find_entry(token, rank, j, id, weight, owner, shape);
            put(row.ids_at + j * 4, &entry.local_id, 4);
            if (weight) put(row.weights_at + j * row.weight_bytes, &entry.weight, row.weight_bytes);
          }
          writer.write(bytes + copied, rest.data(), row.row_bytes - copied);
        }
        writer.finish();
      });
    };
    if (row.weight_bytes == sizeof(double)) {
      write_rows(weights->const_data_ptr<double>());
    } else {
      write_rows(weights ? weights->const_data_ptr<float>() : nullptr);
    }
  });
  return packed;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_pack_rows", TORCH_BOX(&moe_ext::cpu::a2a_pack_rows)); }
