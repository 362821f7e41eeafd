// moe_ext._host: host-side code with no tensor in it, bound by pybind11.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

// What this build holds; `moe_ext.build_info()` shows it.
py::dict build_info() {
  py::dict info;
  info["version"] = MOE_EXT_VERSION;
  info["cuda"] = static_cast<bool>(MOE_EXT_CUDA);
  info["cuda_archs"] = MOE_EXT_CUDA ? std::string(MOE_EXT_CUDA_ARCHS) : std::string();
  info["built_with_torch"] = MOE_EXT_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side planners and build information of moe_ext.";
  m.def("build_info", &build_info, "What this build holds: version, CUDA architectures, torch and compiler.");
}
