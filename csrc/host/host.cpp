// moe_ext._host: host-side code with no tensor in it, bound by pybind11.
#include <pybind11/pybind11.h>

#include <string>

#include "../grouped_gemm/tile_choice.h"
#include "offload/bindings.h"
#include "placement/bindings.h"

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

py::list sm90_tiles() {
  py::list tiles;
  for (const moe_ext::Sm90Tile& tile : moe_ext::kSm90Tiles) {
    py::dict entry;
    entry["name"] = tile.name;
    entry["rows"] = tile.rows;
    entry["columns"] = tile.columns;
    entry["cluster"] = tile.cluster;
    entry["stages"] = tile.stages;
    tiles.append(entry);
  }
  return tiles;
}

std::string choose_sm90_tile(int64_t groups, int64_t rows, int64_t columns, int64_t multiprocessors) {
  return moe_ext::kSm90Tiles[moe_ext::choose_sm90_tile(groups, rows, columns, multiprocessors)].name;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side planners and build information of moe_ext.";
  m.def("build_info", &build_info, "What this build holds: version, CUDA architectures, torch and compiler.");
  m.def("sm90_tiles", &sm90_tiles,
        "The tiles of the sm_90a grouped GEMM that MOE_EXT_SM90_TILE can force: name, rows, columns, cluster, stages "
        "(0: chosen by CUTLASS).");
  m.def("choose_sm90_tile", &choose_sm90_tile, py::arg("groups"), py::arg("rows"), py::arg("columns"),
        py::arg("multiprocessors"),
        "The tile that runs `groups` products whose result is, on average, rows x columns.");
  moe_ext::bind_offload(m);
  moe_ext::bind_placement(m);
}
