// a2a_unpack_rows: rows of bytes as a2a_pack_rows made them -> hidden, ids and weights.
#pragma once

#include <string>
#include <tuple>

#include "../common/dtypes.h"
#include "packed_row.h"

namespace moe_ext {

inline PackedRow check_a2a_unpack_rows(const Tensor& rows, int64_t hidden_size, int64_t topk, ScalarType dtype,
                                       const std::string& payload, bool weighted) {
  check_at_least(hidden_size, "hidden_size", 1);
  check_at_least(topk, "topk", 1);
  int64_t element_bytes = 0;
  dispatch_floating(dtype, "dtype", [&](auto tag) { element_bytes = sizeof(typename decltype(tag)::type); });
  const int64_t weight_bytes = !weighted ? 0 : (router_dtype(dtype) == ScalarType::Double ? 8 : 4);
  const PackedRow row(hidden_size, topk, element_bytes, weight_bytes, is_quantised(payload));
  check_tensor(rows, "rows", {ScalarType::Byte}, 2, "[num_received, row_bytes]");
  check_size(rows, "rows", 1, row.row_bytes, "row_bytes, of this hidden_size, topk, dtype and payload");
  return row;
}

#define MOE_DECLARE_A2A_UNPACK_ROWS                                                                         \
  std::tuple<Tensor, Tensor, Tensor> a2a_unpack_rows(const Tensor& rows, int64_t hidden_size, int64_t topk, \
                                                     ScalarType dtype, std::string payload, bool weighted);
namespace cpu {
MOE_DECLARE_A2A_UNPACK_ROWS
}
namespace cuda {
MOE_DECLARE_A2A_UNPACK_ROWS
}
#undef MOE_DECLARE_A2A_UNPACK_ROWS

}  // namespace moe_ext
