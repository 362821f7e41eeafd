// EPLB's placement of one layer: which expert every physical slot holds.
// Slots are numbered rank by rank; rank r owns slots r * P / R up to (r + 1) * P / R.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

namespace moe_ext {

struct PlacementShape {
  int64_t experts, slots, groups, nodes, ranks;
};

// Items in descending weight, each into the lightest pack that still has room; every pack takes equally many.
// Returns where each item goes: pack * (items per pack) + position in it.
inline std::vector<int64_t> pack_balanced(std::span<const double> weights, int64_t packs) {
  const auto items = static_cast<int64_t>(weights.size()), room = items / packs;
  std::vector<int64_t> place(items), order(items), filled(packs);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (room == 1) return order;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
  using Pack = std::pair<double, int64_t>;
  std::priority_queue<Pack, std::vector<Pack>, std::greater<>> lightest;
  for (int64_t pack = 0; pack < packs; ++pack) lightest.emplace(0.0, pack);
  for (const int64_t item : order) {
    const auto [weight, pack] = lightest.top();
    lightest.pop();
    place[item] = pack * room + filled[pack]++;
    if (filled[pack] < room) lightest.emplace(weight + weights[item], pack);
  }
  return place;
}

// The expert of every slot: each expert once, in order, then, slot by slot, the one with the largest load per replica
// (of equals the one with fewer replicas, then the first: where nothing is loaded, the replicas spread).
inline std::vector<int64_t> replicate(std::span<const double> loads, int64_t slots) {
  const auto experts = static_cast<int64_t>(loads.size());
  std::vector<int64_t> expert_of_slot(slots);
  using Candidate = std::tuple<double, int64_t, int64_t>;  // load per replica, -replicas, -expert
  std::priority_queue<Candidate> heaviest;
  for (int64_t expert = 0; expert < experts; ++expert) {
    expert_of_slot[expert] = expert;
    heaviest.emplace(loads[expert], -1, -expert);
  }
  for (int64_t slot = experts; slot < slots; ++slot) {
    const auto [share, negative_replicas, negative_expert] = heaviest.top();
    heaviest.pop();
    expert_of_slot[slot] = -negative_expert;
    const int64_t replicas = 1 - negative_replicas;
    heaviest.emplace(loads[-negative_expert] / static_cast<double>(replicas), -replicas, negative_expert);
  }
  return expert_of_slot;
}

// Groups of experts to nodes, replicas inside a node, replicas to its ranks. One group and one node: the global policy.
inline void balance_layer(std::span<const double> loads, const PlacementShape& shape, int64_t* expert_of_slot) {
  const int64_t group_size = shape.experts / shape.groups, node_experts = shape.experts / shape.nodes;
  const int64_t node_slots = shape.slots / shape.nodes;
  std::vector<double> group_loads(shape.groups);
  for (int64_t e = 0; e < shape.experts; ++e) group_loads[e / group_size] += loads[e];
  const std::vector<int64_t> group_place = pack_balanced(group_loads, shape.nodes);
  // Experts in node order, and the loads in that order.
  std::vector<int64_t> expert_at(shape.experts);
  std::vector<double> load_at(shape.experts);
  for (int64_t e = 0; e < shape.experts; ++e) {
    const int64_t place = group_place[e / group_size] * group_size + e % group_size;
    expert_at[place] = e;
    load_at[place] = loads[e];
  }
  for (int64_t node = 0; node < shape.nodes; ++node) {
    const std::span<const double> node_loads(load_at.data() + node * node_experts, node_experts);
    const std::vector<int64_t> replicas = replicate(node_loads, node_slots);
    std::vector<int64_t> counts(node_experts);
    for (const int64_t e : replicas) ++counts[e];
    std::vector<double> shares(node_slots);
    for (int64_t s = 0; s < node_slots; ++s) {
      shares[s] = node_loads[replicas[s]] / static_cast<double>(counts[replicas[s]]);
    }
    const std::vector<int64_t> slot_place = pack_balanced(shares, shape.ranks / shape.nodes);
    for (int64_t s = 0; s < node_slots; ++s) {
      expert_of_slot[node * node_slots + slot_place[s]] = expert_at[node * node_experts + replicas[s]];
    }
  }
}

}  // namespace moe_ext
