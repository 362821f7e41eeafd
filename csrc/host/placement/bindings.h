#pragma once

#include <pybind11/pybind11.h>

namespace moe_ext {

void bind_placement(pybind11::module_& m);

}  // namespace moe_ext
