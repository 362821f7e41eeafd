// One row that carries all that a rank needs of a token, so that one collective moves it:
//   payload | weights | scales | local expert ids, zeros up to a multiple of 16 bytes
// payload: hidden_size elements as they are, or e4m3 with one fp32 scale for every 128 of them (DeepSeek-V3), rounded
// up to 16 bytes. weights [topk] in the router's dtype or absent, scales only beside e4m3, ids [topk] int32, -1 for
// "not here". moe_ext.packed_row.PackedRow is the same in Python.
#pragma once

#include <cstdint>
#include <string>

#include "../common/checks.h"
#include "../common/host_device.h"

namespace moe_ext {

constexpr int64_t kRowBytesAlignment = 16;
constexpr int64_t kScaleBlock = 128;

struct PackedRow {
  int64_t hidden_size, topk, element_bytes, weight_bytes;  // weight_bytes 0: no weights
  int64_t scales;                                          // 0: the payload is not quantised
  int64_t weights_at, scales_at, ids_at, row_bytes;

  PackedRow(int64_t hidden_size, int64_t topk, int64_t element_bytes, int64_t weight_bytes, bool quantised)
      : hidden_size(hidden_size),
        topk(topk),
        element_bytes(quantised ? 1 : element_bytes),
        weight_bytes(weight_bytes),
        scales(quantised ? (hidden_size + kScaleBlock - 1) / kScaleBlock : 0) {
    weights_at = aligned(hidden_size * this->element_bytes);
    scales_at = weights_at + topk * weight_bytes;
    ids_at = scales_at + scales * 4;
    row_bytes = aligned(ids_at + topk * 4);
  }

  static constexpr int64_t aligned(int64_t bytes) {
    return (bytes + kRowBytesAlignment - 1) / kRowBytesAlignment * kRowBytesAlignment;
  }
  MOE_HOST_DEVICE int64_t payload_bytes() const { return weights_at; }
  MOE_HOST_DEVICE int64_t padding_at() const { return ids_at + topk * 4; }
};

inline bool is_quantised(const std::string& payload) {
  MOE_CHECK(payload == "native" || payload == "fp8", "payload: expected native or fp8, got ", payload);
  return payload == "fp8";
}

}  // namespace moe_ext
