// The cache simulation over numpy arrays.
#include "bindings.h"

#include <algorithm>
#include <string>

#include "../arrays.h"
#include "expert_cache.h"

namespace py = pybind11;

namespace moe_ext {
namespace {

CachePolicy policy_named(const std::string& name) {
  if (name == "lru") return CachePolicy::kLeastRecentlyUsed;
  if (name == "belady") return CachePolicy::kBelady;
  expect(name == "predicted", "policy: expected lru, belady or predicted, got ", name);
  return CachePolicy::kPredicted;
}

py::tuple simulate_expert_cache(const Bools& needed, const Bools& predicted, int64_t capacity,
                                const std::string& policy, int64_t prefetch_per_layer) {
  expect(needed.ndim() == 3, "needed: expected [num_batches, num_layers, num_experts], got ", describe_shape(needed));
  expect(predicted.ndim() == 3 && std::equal(needed.shape(), needed.shape() + 3, predicted.shape()),
         "predicted: expected ", describe_shape(needed), " as needed, got ", describe_shape(predicted));
  expect(capacity >= 1, "capacity: expected at least 1, got ", capacity);
  expect(prefetch_per_layer >= 0, "prefetch_per_layer: expected at least 0, got ", prefetch_per_layer);
  ExpertCache cache(needed.data(), predicted.data(), needed.shape(0), needed.shape(1), needed.shape(2), capacity,
                    policy_named(policy), prefetch_per_layer);
  CacheCounts counts;
  {
    py::gil_scoped_release unlocked;
    counts = cache.run();
  }
  return py::make_tuple(counts.hits, counts.misses, counts.prefetched);
}

}  // namespace

void bind_offload(py::module_& m) {
  m.def("simulate_expert_cache", &simulate_expert_cache, py::arg("needed"), py::arg("predicted"), py::arg("capacity"),
        py::arg("policy"), py::arg("prefetch_per_layer"),
        "(hits, misses, prefetched) of a cache of `capacity` experts.");
}

}  // namespace moe_ext
