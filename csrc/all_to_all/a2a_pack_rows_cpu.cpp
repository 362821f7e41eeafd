#include "a2a_pack_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/cpu_parallel.h"
#include "../common/huge_pages.h"
#include "fp8_block.h"

namespace moe_ext::cpu {
namespace {

// A block in fp32, in `values`, to e4m3; returns its scale. Plain loops: they vectorise.
template <typename scalar_t>
MOE_CPU_CLONES float quantise_block(const scalar_t* source, int64_t count, uint8_t* output) {
  float values[kScaleBlock];
  // 16 maxima, since one of floats that may be NaN cannot be reordered by the compiler.
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(source[i]);
  for (int64_t i = count; i < kScaleBlock; ++i) values[i] = 0;
  for (int64_t i = 0; i < kScaleBlock; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = larger_magnitude(lanes[lane], std::fabs(values[i + lane]));
    }
  }
  float largest = 0;
  for (float lane : lanes) largest = larger_magnitude(largest, lane);
  const float scale = block_scale(largest);
  const BlockDivision divide(scale);
  uint8_t quantised[kScaleBlock];
  for (int64_t i = 0; i < kScaleBlock; ++i) quantised[i] = to_e4m3(divide(values[i]));
  std::memcpy(output, quantised, count);
  return scale;
}

template <typename scalar_t>
void write_payload(const scalar_t* source, const PackedRow& row, char* output) {
  if (row.scales == 0) {
    std::memcpy(output, source, row.hidden_size * sizeof(scalar_t));
    return;
  }
  for (int64_t block = 0; block < row.scales; ++block) {
    const int64_t first = block * kScaleBlock, count = std::min(kScaleBlock, row.hidden_size - first);
    const float scale = quantise_block(source + first, count, reinterpret_cast<uint8_t*>(output) + first);
    std::memcpy(output + row.scales_at + block * sizeof(float), &scale, sizeof(float));
  }
}

}  // namespace

Tensor a2a_pack_rows(const Tensor& hidden, const Tensor& topk_ids, const std::optional<Tensor>& topk_weights,
                     const Tensor& rank_expert_offsets, const Tensor& send_offsets, const Tensor& send_to_slot,
                     const Tensor& slot_to_send, std::string payload, int64_t copies) {
  const auto [shape, row, _] = check_a2a_pack_rows(hidden, topk_ids, topk_weights, rank_expert_offsets, send_offsets,
                                                   send_to_slot, slot_to_send, payload, copies);
  const Tensor source = torch::stable::contiguous(hidden), ids = torch::stable::contiguous(topk_ids);
  const std::optional<Tensor> weights =
      topk_weights ? std::optional(torch::stable::contiguous(*topk_weights)) : std::nullopt;
  const Tensor owners = torch::stable::contiguous(rank_expert_offsets),
               starts = torch::stable::contiguous(send_offsets);
  const Tensor slots = torch::stable::contiguous(send_to_slot);
  Tensor packed = new_empty_large(hidden, {shape.num_rows, row.row_bytes}, ScalarType::Byte);
  dispatch_index(topk_ids.scalar_type(), "topk_ids", [&](auto index_tag) {
    dispatch_floating(hidden.scalar_type(), "hidden", [&](auto tag) {
      using scalar_t = typename decltype(tag)::type;
      using weight_t = accumulate_t<scalar_t>;
      const auto* rows = source.const_data_ptr<scalar_t>();
      const auto* id = ids.const_data_ptr<typename decltype(index_tag)::type>();
      const auto* weight = weights ? weights->const_data_ptr<weight_t>() : nullptr;
      const auto *owner = owners.const_data_ptr<int32_t>(), *start = starts.const_data_ptr<int32_t>();
      const auto* slot_of_row = slots.const_data_ptr<int32_t>();
      auto* output = static_cast<char*>(packed.mutable_data_ptr());
      parallel_rows(shape.num_rows, row.row_bytes + row.hidden_size * static_cast<int64_t>(sizeof(scalar_t)),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t m = begin; m < end; ++m) {
                        char* bytes = output + m * row.row_bytes;
                        const int64_t token = token_of_row(slot_of_row[m], shape);
                        std::memset(bytes + row.hidden_size * row.element_bytes, 0,
                                    row.payload_bytes() - row.hidden_size * row.element_bytes);
                        if (token >= 0) {
                          write_payload(rows + token / copies * row.hidden_size, row, bytes);
                        } else {
                          std::memset(bytes, 0, row.payload_bytes());
                          const float scale = block_scale(0);
                          for (int64_t block = 0; block < row.scales; ++block) {
                            std::memcpy(bytes + row.scales_at + block * sizeof(float), &scale, sizeof(float));
                          }
                        }
                        const int rank = find_interval(start, static_cast<int>(shape.num_ranks), m);
                        for (int64_t j = 0; j < shape.topk; ++j) {
                          const auto entry = find_entry(token, rank, j, id, weight, owner, shape);
                          std::memcpy(bytes + row.ids_at + j * sizeof(int32_t), &entry.local_id, sizeof(int32_t));
                          if (weight)
                            std::memcpy(bytes + row.weights_at + j * sizeof(weight_t), &entry.weight, sizeof(weight_t));
                        }
                        std::memset(bytes + row.padding_at(), 0, row.row_bytes - row.padding_at());
                      }
                    });
    });
  });
  return packed;
}

}  // namespace moe_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("a2a_pack_rows", TORCH_BOX(&moe_ext::cpu::a2a_pack_rows)); }
