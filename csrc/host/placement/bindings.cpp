// The placement planners over numpy arrays: checks, and one call per layer.
#include "bindings.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../arrays.h"
#include "balance.h"
#include "rebalance.h"
#include "traffic.h"

namespace py = pybind11;

namespace moe_ext {
namespace {

void check_divides(const char* name, int64_t divisor, const char* of, int64_t value) {
  expect(divisor > 0 && value % divisor == 0, name, ": expected a divisor of ", of, " ", value, ", got ", divisor);
}

void check_shape(const PlacementShape& shape) {
  expect(shape.experts > 0, "loads: expected at least one expert, got 0");
  check_divides("num_nodes", shape.nodes, "num_ranks", shape.ranks);
  check_divides("num_ranks", shape.ranks, "num_slots", shape.slots);
  expect(shape.slots >= shape.experts, "num_slots: expected at least one for each of ", shape.experts, " experts, got ",
         shape.slots);
}

void check_loads(const Doubles& loads) {
  expect(loads.ndim() == 2, "loads: expected [num_layers, num_experts], got ", describe_shape(loads));
  expect(std::all_of(loads.data(), loads.data() + loads.size(), [](double x) { return x >= 0 && std::isfinite(x); }),
         "loads: expected finite numbers that are not negative");
}

void check_phy2log(const Longs& phy2log, int64_t num_experts) {
  expect(phy2log.ndim() == 2, "phy2log: expected [num_layers, num_slots], got ", describe_shape(phy2log));
  for (py::ssize_t layer = 0; layer < phy2log.shape(0); ++layer) {
    std::vector<bool> present(num_experts);
    for (py::ssize_t slot = 0; slot < phy2log.shape(1); ++slot) {
      const int64_t expert = *phy2log.data(layer, slot);
      expect(expert >= 0 && expert < num_experts, "phy2log: expected experts below ", num_experts, ", got ", expert,
             " in layer ", layer);
      present[expert] = true;
    }
    const auto missing = std::find(present.begin(), present.end(), false);
    expect(missing == present.end(), "phy2log: expert ", missing - present.begin(), " has no slot in layer ", layer);
  }
}

Longs balance_experts(const Doubles& loads, int64_t num_slots, int64_t num_groups, int64_t num_nodes,
                      int64_t num_ranks) {
  check_loads(loads);
  const PlacementShape shape{loads.shape(1), num_slots, num_groups, num_nodes, num_ranks};
  check_shape(shape);
  check_divides("num_groups", num_groups, "num_experts", shape.experts);
  check_divides("num_nodes", num_nodes, "num_groups", num_groups);
  Longs phy2log({loads.shape(0), static_cast<py::ssize_t>(num_slots)});
  int64_t* out = phy2log.mutable_data();
  const int64_t layers = loads.shape(0);
  py::gil_scoped_release unlocked;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::span<const double> layer_loads(loads.data() + layer * shape.experts, shape.experts);
    balance_layer(layer_loads, shape, out + layer * num_slots);
  }
  return phy2log;
}

Longs rebalance_experts(const Doubles& loads, const Longs& phy2log, int64_t num_nodes, int64_t num_ranks,
                        int64_t max_moves) {
  check_loads(loads);
  check_phy2log(phy2log, loads.shape(1));
  expect(phy2log.shape(0) == loads.shape(0), "phy2log: expected ", loads.shape(0), " layers as loads has, got ",
         phy2log.shape(0));
  const PlacementShape shape{loads.shape(1), phy2log.shape(1), 1, num_nodes, num_ranks};
  check_shape(shape);
  expect(max_moves >= 0, "max_moves: expected at least 0, got ", max_moves);
  Longs result(std::vector<py::ssize_t>{phy2log.shape(0), phy2log.shape(1)});
  std::copy_n(phy2log.data(), phy2log.size(), result.mutable_data());
  int64_t* out = result.mutable_data();
  const int64_t layers = loads.shape(0);
  py::gil_scoped_release unlocked;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::span<const double> layer_loads(loads.data() + layer * shape.experts, shape.experts);
    Rebalancer(layer_loads, shape, std::span(out + layer * shape.slots, shape.slots)).run(max_moves);
  }
  return result;
}

std::pair<Longs, Longs> placement_maps(const Longs& phy2log, int64_t num_experts) {
  expect(num_experts > 0, "num_experts: expected at least 1, got ", num_experts);
  check_phy2log(phy2log, num_experts);
  const py::ssize_t layers = phy2log.shape(0), slots = phy2log.shape(1), experts = num_experts;
  Longs counts({layers, experts});
  std::fill_n(counts.mutable_data(), counts.size(), 0);
  int64_t most = 0;
  for (py::ssize_t layer = 0; layer < layers; ++layer) {
    for (py::ssize_t slot = 0; slot < slots; ++slot) {
      most = std::max(most, ++*counts.mutable_data(layer, *phy2log.data(layer, slot)));
    }
  }
  Longs log2phy({layers, experts, static_cast<py::ssize_t>(most)});
  std::fill_n(log2phy.mutable_data(), log2phy.size(), -1);
  for (py::ssize_t layer = 0; layer < layers; ++layer) {
    std::vector<int64_t> filled(num_experts);
    for (py::ssize_t slot = 0; slot < slots; ++slot) {
      const int64_t expert = *phy2log.data(layer, slot);
      *log2phy.mutable_data(layer, expert, filled[expert]++) = slot;
    }
  }
  return {log2phy, counts};
}

py::tuple count_traffic(const Ints& topk_ids, const Longs& phy2log, int64_t num_experts, int64_t num_ranks,
                        int64_t ranks_per_node, bool nearest, bool follow) {
  expect(topk_ids.ndim() == 3, "topk_ids: expected [num_layers, num_tokens, topk], got ", describe_shape(topk_ids));
  const auto [log2phy, logcnt] = placement_maps(phy2log, num_experts);
  expect(phy2log.shape(0) == topk_ids.shape(0), "phy2log: expected ", topk_ids.shape(0),
         " layers as topk_ids has, got ", phy2log.shape(0));
  check_divides("num_ranks", num_ranks, "num_slots", phy2log.shape(1));
  check_divides("ranks_per_node", ranks_per_node, "num_ranks", num_ranks);
  const py::ssize_t layers = topk_ids.shape(0), ranks = num_ranks;
  Longs rows({layers, ranks}), active({layers, ranks});
  Longs copies(std::vector<py::ssize_t>{layers, kTrafficKinds, kLinks, kDirections, ranks});
  for (Longs* counts : {&rows, &active, &copies}) std::fill_n(counts->mutable_data(), counts->size(), 0);
  const Placement placement{log2phy.data(), logcnt.data(), num_experts, log2phy.shape(2), phy2log.shape(1)};
  const Trace trace{topk_ids.data(), topk_ids.shape(0), topk_ids.shape(1), topk_ids.shape(2)};
  const TrafficCounts out{rows.mutable_data(), active.mutable_data(), copies.mutable_data()};
  {
    py::gil_scoped_release unlocked;
    TrafficCounter(placement, {num_ranks, ranks_per_node}, nearest, follow).run(trace, out);
  }
  return py::make_tuple(rows, active, copies);
}

}  // namespace

void bind_placement(py::module_& m) {
  m.def("balance_experts", &balance_experts, py::arg("loads"), py::arg("num_slots"), py::arg("num_groups"),
        py::arg("num_nodes"), py::arg("num_ranks"), "EPLB: loads [layers, experts] -> phy2log [layers, num_slots].");
  m.def("rebalance_experts", &rebalance_experts, py::arg("loads"), py::arg("phy2log"), py::arg("num_nodes"),
        py::arg("num_ranks"), py::arg("max_moves"), "phy2log improved by at most max_moves changed slots per layer.");
  m.def("placement_maps", &placement_maps, py::arg("phy2log"), py::arg("num_experts"),
        "log2phy [layers, experts, replicas] padded with -1, logcnt [layers, experts].");
  m.def("count_traffic", &count_traffic, py::arg("topk_ids"), py::arg("phy2log"), py::arg("num_experts"),
        py::arg("num_ranks"), py::arg("ranks_per_node"), py::arg("nearest"), py::arg("follow"),
        "rows and active experts [layers, ranks]; hidden rows sent [layers, (per slot, per rank, per node), (intra, "
        "inter), (out, in), ranks].");
}

}  // namespace moe_ext
