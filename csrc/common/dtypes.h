// From a runtime dtype to a C++ type, and the type it is accumulated in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"

namespace moe_ext {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// GEMMs, gates and reductions of 16-bit data accumulate in fp32.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename scalar_t>
using accumulate_t = typename Accumulate<scalar_t>::type;

// The dtype of router weights: fp32 whatever the logits are, but float64 for float64.
inline ScalarType router_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// body(TypeTag<scalar_t>{}); the CPU takes all four floating dtypes.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: return body(TypeTag<float>{});
    case ScalarType::Double: return body(TypeTag<double>{});
    case ScalarType::BFloat16: return body(TypeTag<BFloat16>{});
    case ScalarType::Half: return body(TypeTag<Half>{});
    default: MOE_CHECK(false, name, ": expected a floating dtype, got ", dtype_name(dtype));
  }
}

// CUDA kernels come in fp32, bf16 and fp16.
template <typename Body>
void dispatch_floating_cuda(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: return body(TypeTag<float>{});
    case ScalarType::BFloat16: return body(TypeTag<BFloat16>{});
    case ScalarType::Half: return body(TypeTag<Half>{});
    default: MOE_CHECK(false, name, ": expected float32, bfloat16 or float16 on CUDA, got ", dtype_name(dtype));
  }
}

template <typename Body>
void dispatch_index(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Int: return body(TypeTag<int32_t>{});
    case ScalarType::Long: return body(TypeTag<int64_t>{});
    default: MOE_CHECK(false, name, ": expected int32 or int64, got ", dtype_name(dtype));
  }
}

}  // namespace moe_ext
