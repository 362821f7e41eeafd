// Numpy arrays as the planners take them, and checks that raise ValueError.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

namespace moe_ext {

constexpr int kArrayFlags = pybind11::array::c_style | pybind11::array::forcecast;
using Doubles = pybind11::array_t<double, kArrayFlags>;
using Longs = pybind11::array_t<int64_t, kArrayFlags>;
using Ints = pybind11::array_t<int32_t, kArrayFlags>;
using Bools = pybind11::array_t<bool, kArrayFlags>;

// Throws ValueError with the parts as its words.
template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw pybind11::value_error(message.str());
}

inline std::string describe_shape(const pybind11::array& array) {
  std::ostringstream stream;
  stream << "[";
  for (pybind11::ssize_t axis = 0; axis < array.ndim(); ++axis) stream << (axis ? ", " : "") << array.shape(axis);
  stream << "]";
  return stream.str();
}

}  // namespace moe_ext
