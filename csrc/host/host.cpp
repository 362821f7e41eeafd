// moe_ext._host: host-side code with no tensor in it, bound by pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../grouped_gemm/tile_choice.h"

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

// A table without names has no tile that could be forced, and so none to list.
template <typename Tile>
void append_name(const Tile& tile, std::vector<std::string>& names) {
  if constexpr (requires { tile.name; }) names.emplace_back(tile.name);
}

std::vector<std::string> sm90_tiles() {
  std::vector<std::string> names;
  for (const auto& tile : moe_ext::kSm90Tiles) append_name(tile, names);
  return names;
}

std::string choose_sm90_tile(int64_t groups, int64_t rows, int64_t columns, int64_t multiprocessors) {
  return sm90_tiles().at(static_cast<size_t>(moe_ext::choose_sm90_tile(groups, rows, columns, multiprocessors)));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side planners and build information of moe_ext.";
  m.def("build_info", &build_info, "What this build holds: version, CUDA architectures, torch and compiler.");
  m.def("sm90_tiles", &sm90_tiles, "Names of the compiled sm_90a tiles of the grouped products.");
  m.def("choose_sm90_tile", &choose_sm90_tile, py::arg("groups"), py::arg("rows"), py::arg("columns"),
        py::arg("multiprocessors"),
        "The tile that runs `groups` products whose result is, on average, rows x columns.");
}
