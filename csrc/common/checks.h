// Host checks that speak: which argument, what was expected, what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace moe_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error("<message>"); shows up in Python as RuntimeError with exactly these words.
#define MOE_CHECK(condition, ...)                                   \
  do {                                                              \
    if (!(condition)) {                                             \
      std::ostringstream moe_check_message;                         \
      ::moe_ext::detail::write_all(moe_check_message, __VA_ARGS__); \
      throw std::runtime_error(std::move(moe_check_message).str()); \
    }                                                               \
  } while (0)

namespace detail {
template <typename... Parts>
void write_all(std::ostringstream& stream, const Parts&... parts) {
  ((stream << parts), ...);
}
}  // namespace detail

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string describe_sizes(const Tensor& tensor) {
  std::ostringstream stream;
  stream << "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) stream << (axis ? ", " : "") << tensor.size(axis);
  stream << "]";
  return stream.str();
}

// "float32 [8, 2]"
inline std::string describe(const Tensor& tensor) {
  return std::string(dtype_name(tensor.scalar_type())) + " " + describe_sizes(tensor);
}

inline std::string join_dtypes(std::initializer_list<ScalarType> dtypes) {
  std::string text;
  size_t index = 0;
  for (ScalarType dtype : dtypes) {
    if (index) text += index + 1 == dtypes.size() ? " or " : ", ";
    text += dtype_name(dtype);
    ++index;
  }
  return text;
}

// `shape` is the expected shape in words, e.g. "[num_tokens, topk]"; its number of axes is checked through `dim`.
inline void check_tensor(const Tensor& tensor, const char* name, std::initializer_list<ScalarType> dtypes, int64_t dim,
                         const char* shape) {
  bool dtype_ok = false;
  for (ScalarType dtype : dtypes) dtype_ok = dtype_ok || tensor.scalar_type() == dtype;
  MOE_CHECK(dtype_ok && tensor.dim() == dim, name, ": expected ", join_dtypes(dtypes), " ", shape, ", got ",
            describe(tensor));
}

// `meaning` says where the expected number comes from, e.g. "num_tokens, as in input".
inline void check_size(const Tensor& tensor, const char* name, int64_t axis, int64_t expected, const char* meaning) {
  MOE_CHECK(tensor.size(axis) == expected, name, ": expected size ", expected, " (", meaning, ") in dimension ", axis,
            ", got ", describe(tensor));
}

inline std::string describe_device(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  MOE_CHECK(tensor.device() == other.device(), name, ": expected a tensor on ", describe_device(other),
            ", the device of ", other_name, ", got one on ", describe_device(tensor));
}

inline void check_same_dtype(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  MOE_CHECK(tensor.scalar_type() == other.scalar_type(), name, ": expected ", dtype_name(other.scalar_type()),
            ", the dtype of ", other_name, ", got ", dtype_name(tensor.scalar_type()));
}

inline void check_at_least(int64_t value, const char* name, int64_t minimum) {
  MOE_CHECK(value >= minimum, name, ": expected an integer >= ", minimum, ", got ", value);
}

// Row and slot numbers are int32 throughout: half the index traffic, and 2^31 slots are out of reach of one device.
inline void check_fits_int32(int64_t value, const char* what) {
  MOE_CHECK(value <= std::numeric_limits<int32_t>::max(), what, ": expected at most 2^31 - 1, got ", value);
}

// What a row, a weight or a logit may be. float64 is there on the CPU only, for gradcheck.
#define MOE_FLOATING ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double

}  // namespace moe_ext
