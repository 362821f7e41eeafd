// What a placement makes of a routing trace: rows per rank, and how often a token's hidden row crosses each link.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_ext {

struct Trace {
  const int32_t* topk_ids;  // [layers, tokens, topk]
  int64_t layers, tokens, topk;
};

struct Placement {
  const int64_t* log2phy;  // [layers, experts, replicas], -1 behind the last
  const int64_t* logcnt;   // [layers, experts]
  int64_t experts, replicas, slots;
};

struct Ranks {
  int64_t count, per_node;
};

// How an all-to-all may send a token: once for every slot; once for every rank that needs it; once for every node that
// needs it, to the rank there with the sender's place in its node, which hands it on.
enum TrafficKind : int64_t { kPerSlot, kPerRank, kPerNode, kTrafficKinds };
enum Link : int64_t { kIntraNode, kInterNode, kLinks };
enum Direction : int64_t { kOut, kIn, kDirections };

struct TrafficCounts {
  int64_t* rows;            // [layers, ranks]: slots computed
  int64_t* active_experts;  // [layers, ranks]: physical experts with a row
  int64_t* copies;          // [layers, kinds, links, directions, ranks]: hidden rows
};

class TrafficCounter {
 public:
  TrafficCounter(const Placement& placement, const Ranks& ranks, bool nearest, bool follow)
      : placement_(placement),
        ranks_(ranks),
        nearest_(nearest),
        follow_(follow),
        rank_seen_(ranks.count, -1),
        node_seen_(ranks.count / ranks.per_node, -1),
        slot_seen_(placement.slots, -1) {}

  // Token t starts on rank t * ranks / tokens and is there again in every layer; with `follow` it stays where its first
  // expert was (ExFlow, MoETuner). Ids outside the experts are no slot.
  void run(const Trace& trace, const TrafficCounts& out) {
    std::vector<int64_t> home(trace.tokens);
    for (int64_t token = 0; token < trace.tokens; ++token) home[token] = token * ranks_.count / trace.tokens;
    for (int64_t layer = 0; layer < trace.layers; ++layer) {
      rows_ = out.rows + layer * ranks_.count;
      active_ = out.active_experts + layer * ranks_.count;
      copies_ = out.copies + layer * kTrafficKinds * kLinks * kDirections * ranks_.count;
      for (int64_t token = 0; token < trace.tokens; ++token) {
        const int32_t* ids = trace.topk_ids + (layer * trace.tokens + token) * trace.topk;
        const int64_t source = home[token];
        int64_t first = -1;
        stamp_ = layer * trace.tokens + token;
        for (int64_t k = 0; k < trace.topk; ++k) {
          if (ids[k] < 0 || ids[k] >= placement_.experts) continue;
          const int64_t rank = count(layer, token, source, ids[k]);
          if (first < 0) first = rank;
        }
        if (follow_ && first >= 0) home[token] = first;
      }
    }
  }

 private:
  // Returns the rank that computes the slot.
  int64_t count(int64_t layer, int64_t token, int64_t source, int64_t expert) {
    const int64_t slot = choose_replica(layer, token, source, expert);
    const int64_t rank = rank_of(slot);
    ++rows_[rank];
    // A slot's stamp of an earlier token of this layer says that it is active already.
    if (slot_seen_[slot] < layer) slot_seen_[slot] = layer, ++active_[rank];
    cross(kPerSlot, source, rank);
    if (rank_seen_[rank] == stamp_) return rank;
    rank_seen_[rank] = stamp_;
    cross(kPerRank, source, rank);
    const int64_t node = rank / ranks_.per_node, entry = node * ranks_.per_node + source % ranks_.per_node;
    if (node_seen_[node] != stamp_) {
      node_seen_[node] = stamp_;
      cross(kPerNode, source, entry);
    }
    cross(kPerNode, entry, rank);
    return rank;
  }

  // Tokens take the replicas in turn; with `nearest`, those on their own rank first, then those of their own node.
  int64_t choose_replica(int64_t layer, int64_t token, int64_t source, int64_t expert) const {
    const int64_t row = layer * placement_.experts + expert, count = placement_.logcnt[row];
    const int64_t* slots = placement_.log2phy + row * placement_.replicas;
    if (count == 1) return slots[0];
    if (nearest_) {
      int64_t here = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (rank_of(slots[i]) == source) return slots[i];
        here += same_node(rank_of(slots[i]), source);
      }
      for (int64_t i = 0, skip = here ? token % here : 0; here && i < count; ++i) {
        if (same_node(rank_of(slots[i]), source) && skip-- == 0) return slots[i];
      }
    }
    return slots[token % count];
  }

  void cross(int64_t kind, int64_t from, int64_t to) {
    if (from == to) return;
    const int64_t link = same_node(from, to) ? kIntraNode : kInterNode;
    int64_t* counts = copies_ + (kind * kLinks + link) * kDirections * ranks_.count;
    ++counts[kOut * ranks_.count + from];
    ++counts[kIn * ranks_.count + to];
  }

  int64_t rank_of(int64_t slot) const { return slot / (placement_.slots / ranks_.count); }
  bool same_node(int64_t a, int64_t b) const { return a / ranks_.per_node == b / ranks_.per_node; }

  Placement placement_;
  Ranks ranks_;
  bool nearest_, follow_;
  // The last token that went there, the last layer in which a slot had a row.
  std::vector<int64_t> rank_seen_, node_seen_, slot_seen_;
  int64_t *rows_ = nullptr, *active_ = nullptr, *copies_ = nullptr, stamp_ = 0;
};

}  // namespace moe_ext
