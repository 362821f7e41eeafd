// Incremental rebalancing of one layer: a placement in use is improved by a bounded number of weight moves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "balance.h"

namespace moe_ext {

// Local search. Each step takes the hottest rank and the change that lowers it most without making another rank as hot
// as it was, so that the sorted rank loads fall from step to step and the search ends. Changes:
//   replace   a slot whose expert has another replica takes one of the hot rank's experts (1 move), or a slot of the
//             hot rank gives up such a replica for a colder expert (1 move);
//   swap      a slot of the hot rank and a slot elsewhere exchange experts (2 moves).
// A rank never gets a second replica of an expert it holds. With several nodes, changes stay inside a node, so that
// groups of experts stay where they are.
class Rebalancer {
 public:
  Rebalancer(std::span<const double> loads, const PlacementShape& shape, std::span<int64_t> expert_of_slot)
      : loads_(loads),
        slots_(expert_of_slot),
        rank_slots_(shape.slots / shape.ranks),
        node_slots_(shape.slots / shape.nodes),
        slots_of_(shape.experts),
        rank_load_(shape.ranks),
        changed_(shape.ranks) {
    for (int64_t s = 0; s < shape.slots; ++s) slots_of_[slots_[s]].push_back(s);
    for (int64_t r = 0; r < shape.ranks; ++r) rank_load_[r] = load_of_rank(r);
  }

  // Returns the moves made, at most max_moves.
  int64_t run(int64_t max_moves) {
    int64_t moves = 0;
    while (moves < max_moves) {
      const Change best = best_change(max_moves - moves);
      if (best.slot < 0) break;
      apply(best);
      moves += best.other_slot < 0 ? 1 : 2;
    }
    return moves;
  }

 private:
  // slot takes `expert`; if other_slot >= 0, that one takes what slot held.
  struct Change {
    int64_t slot = -1, expert = -1, other_slot = -1;
    double hottest = 0;
  };

  int64_t rank_of(int64_t slot) const { return slot / rank_slots_; }
  int64_t replicas(int64_t expert) const { return static_cast<int64_t>(slots_of_[expert].size()); }
  double share(int64_t expert, int64_t replicas) const { return loads_[expert] / static_cast<double>(replicas); }
  double share(int64_t expert) const { return share(expert, replicas(expert)); }

  double load_of_rank(int64_t rank) const {
    double load = 0;
    for (int64_t s = rank * rank_slots_; s < (rank + 1) * rank_slots_; ++s) load += share(slots_[s]);
    return load;
  }

  bool holds(int64_t rank, int64_t expert) const {
    const auto first = slots_.begin() + rank * rank_slots_;
    return std::find(first, first + rank_slots_, expert) != first + rank_slots_;
  }

  Change best_change(int64_t moves_left) {
    const auto hot = std::max_element(rank_load_.begin(), rank_load_.end()) - rank_load_.begin();
    Change best;
    // Less than rounding is no gain.
    best.hottest = rank_load_[hot] * (1 - 1e-9);
    const int64_t hot_begin = hot * rank_slots_, hot_end = hot_begin + rank_slots_;
    const int64_t node_begin = hot_begin / node_slots_ * node_slots_, node_end = node_begin + node_slots_;
    for (int64_t slot = node_begin; slot < node_end; ++slot) {
      const bool in_hot = slot >= hot_begin && slot < hot_end;
      if (in_hot) {
        if (replicas(slots_[slot]) < 2) continue;
        for (int64_t expert = 0; expert < static_cast<int64_t>(loads_.size()); ++expert) {
          const int64_t home = slots_of_[expert].front();
          if (home >= node_begin && home < node_end) try_replace(slot, expert, hot, best);
        }
        continue;
      }
      for (int64_t mine = hot_begin; mine < hot_end; ++mine) {
        if (replicas(slots_[slot]) > 1) try_replace(slot, slots_[mine], hot, best);
        if (moves_left > 1) try_swap(mine, slot, best);
      }
    }
    return best;
  }

  void try_replace(int64_t slot, int64_t expert, int64_t hot, Change& best) {
    const int64_t old = slots_[slot], rank = rank_of(slot);
    if (expert == old || holds(rank, expert)) return;
    // The other replicas of `old` take over its load, those of `expert` lose some.
    const double more = share(old, replicas(old) - 1) - share(old), fewer_share = share(expert, replicas(expert) + 1);
    const double less = fewer_share - share(expert);
    for (const int64_t s : slots_of_[expert]) changed_[rank_of(s)] += less;
    for (const int64_t s : slots_of_[old]) changed_[rank_of(s)] += s == slot ? fewer_share - share(old) : more;
    double hottest = rank_load_[hot] + changed_[hot];
    for (const int64_t s : slots_of_[old]) {
      hottest = std::max(hottest, rank_load_[rank_of(s)] + changed_[rank_of(s)]);
    }
    for (const int64_t s : slots_of_[expert]) changed_[rank_of(s)] = 0;
    for (const int64_t s : slots_of_[old]) changed_[rank_of(s)] = 0;
    if (hottest < best.hottest) best = {slot, expert, -1, hottest};
  }

  void try_swap(int64_t mine, int64_t other, Change& best) const {
    const int64_t hot = rank_of(mine), rank = rank_of(other), given = slots_[mine], taken = slots_[other];
    const double difference = share(given) - share(taken);
    const double hottest = std::max(rank_load_[hot] - difference, rank_load_[rank] + difference);
    if (hottest >= best.hottest || holds(rank, given) || holds(hot, taken)) return;
    best = {other, given, mine, hottest};
  }

  void apply(const Change& change) {
    const int64_t old = slots_[change.slot];
    if (change.other_slot >= 0) put(change.other_slot, old);
    put(change.slot, change.expert);
    // Afresh, so that no rounding piles up.
    for (const int64_t expert : {old, change.expert}) {
      for (const int64_t s : slots_of_[expert]) rank_load_[rank_of(s)] = load_of_rank(rank_of(s));
    }
    rank_load_[rank_of(change.slot)] = load_of_rank(rank_of(change.slot));
  }

  void put(int64_t slot, int64_t expert) {
    auto& before = slots_of_[slots_[slot]];
    before.erase(std::find(before.begin(), before.end(), slot));
    slots_of_[expert].push_back(slot);
    slots_[slot] = expert;
  }

  std::span<const double> loads_;
  std::span<int64_t> slots_;
  int64_t rank_slots_, node_slots_;
  std::vector<std::vector<int64_t>> slots_of_;
  std::vector<double> rank_load_, changed_;
};

}  // namespace moe_ext
