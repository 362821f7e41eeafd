// The choice of topk experts for one token by a group of lanes, over keys in memory.
// A lane owns the keys of consecutive experts and knows the best of them. A round takes the best of the lanes' bests,
// the lowest lane and expert winning ties, and then all lanes together look through the keys of the one lane that lost
// its best: the cost of a round does not grow with the number of experts.
#pragma once

#include "expert_row.h"
#include "topk_gating.h"

namespace moe_ext::cuda {

// What the selection compares, as an integer of the same order: 0 for no candidate, 1 for NaN. + 0 makes one zero of
// the two.
constexpr uint32_t kNanKey = 1;
__device__ inline uint32_t selection_key(float value) { return value == value ? ordered_key(value + 0.f) : kNanKey; }

__device__ inline float value_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The keys of a token, by expert: in shared memory, where vectors of four are permuted so that lanes which read their
// own consecutive keys meet no bank conflicts, or, wide, in a workspace. Past the last expert the keys are 0.
template <typename Layout>
struct KeyRow {
  static_assert(Layout::per_lane <= Layout::lanes);
  using Quad = Vector<uint32_t, 4>;
  uint32_t* keys;
  int owned;  // keys per lane

  __device__ KeyRow(uint32_t* keys, int num_experts)
      : keys(keys), owned(Layout::wide ? (num_experts + kWarpSize - 1) / kWarpSize : Layout::per_lane) {}
  // Words of a row in shared memory.
  static constexpr int words() { return Layout::lanes * Layout::per_lane; }
  __device__ static int place(int expert) { return Layout::wide ? expert : expert ^ (expert >> 5 & 7) << 2; }
  __device__ uint32_t& operator[](int expert) const { return keys[place(expert)]; }

  // key(i) of every element of this lane.
  template <typename Row, typename Key>
  __device__ void store(const Row& row, const Key& key) const {
#pragma unroll
    for (int i = 0; i < row.count(); i += Layout::width) {
      const int first = Layout::expert(i, Layout::lane());
      if constexpr (Layout::width == 4) {
        *reinterpret_cast<Quad*>(keys + place(first)) = {key(i), key(i + 1), key(i + 2), key(i + 3)};
      } else {
        (*this)[first] = key(i);
      }
    }
  }
  // The best key that this lane owns.
  __device__ uint32_t best_owned() const {
    uint32_t best = 0;
    const int first = Layout::lane() * (Layout::wide ? owned : Layout::per_lane);
    if constexpr (Layout::wide) {
      for (int i = 0; i < owned; ++i) best = max(best, keys[first + i]);
    } else {
#pragma unroll
      for (int i = 0; i < Layout::per_lane; i += 4) {
        const Quad quad = *reinterpret_cast<const Quad*>(keys + place(first + i));
        best = max(best, max(max(quad.values[0], quad.values[1]), max(quad.values[2], quad.values[3])));
      }
    }
    return best;
  }
};

// Takes out the experts of all but the best groups. A group's score is the sum of its two best values (DeepSeek-V3);
// NaN does not count. group_keys: num_groups words of shared memory. by_group holds what groups are scored by, and
// afterwards what `final_key` gives, 0 in the groups that fell out.
template <typename Layout, typename Row, typename Key>
__device__ void drop_groups(const KeyRow<Layout>& keys, const Row& row, uint32_t* group_keys,
                            const GateOptions& options, bool rewrite, const Key& final_key) {
  const int lane = Layout::lane(), num_groups = static_cast<int>(options.num_groups);
  const int size = static_cast<int>(options.num_experts / options.num_groups);
  int parts = Layout::lanes;  // lanes per group of experts
  while (parts > 1 && parts * num_groups > Layout::lanes) parts /= 2;
  for (int first = 0; first < num_groups; first += Layout::lanes / parts) {
    const int group = first + lane / parts, part = lane % parts;
    const int count = group < num_groups && part < size ? (size - part + parts - 1) / parts : 0;
    uint32_t best = 0, second = 0;
    // Groups begin at different places, or else the lanes of equally large groups would meet in one bank.
    for (int n = 0, i = count > 0 ? group % count : 0; n < count; ++n) {
      const uint32_t key = keys[group * size + part + i * parts];
      second = max(second, min(best, key));
      best = max(best, key);
      if (++i == count) i = 0;
    }
    for (int offset = parts / 2; offset > 0; offset /= 2) {
      const uint32_t other = __shfl_xor_sync(kFullMask, best, offset);
      second = max(max(second, __shfl_xor_sync(kFullMask, second, offset)), min(best, other));
      best = max(best, other);
    }
    float score = best > kNanKey ? value_of_key(best) : -INFINITY;
    if (second > kNanKey && value_of_key(second) > -INFINITY) score += value_of_key(second);
    if (group < num_groups && part == 0) group_keys[group] = selection_key(score);
  }
  __syncwarp();
  if (rewrite) keys.store(row, final_key);
  for (int first = 0; first < num_groups; first += Layout::lanes) {
    const int group = first + lane;
    int ahead = 0;
    for (int other = 0; group < num_groups && other < num_groups; ++other) {
      ahead += group_keys[other] > group_keys[group] || (group_keys[other] == group_keys[group] && other < group);
    }
    unsigned dropped = __ballot_sync(kFullMask, group < num_groups && ahead >= options.topk_groups);
    dropped = dropped >> (threadIdx.x % kWarpSize / Layout::lanes * Layout::lanes);
    __syncwarp();
    for (int g = 0; g < Layout::lanes && first + g < num_groups; ++g) {
      if (!(dropped >> g & 1)) continue;
      for (int i = lane; i < size; i += Layout::lanes) keys[(first + g) * size + i] = 0;
    }
  }
  __syncwarp();
}

// ids[j] in shared memory: the j-th choice, -1 where no candidate is left. Takes the chosen keys out.
template <typename Layout>
__device__ void select_experts(const KeyRow<Layout>& keys, int topk, int* ids) {
  const int lane = Layout::lane();
  uint32_t best = keys.best_owned();
  for (int j = 0; j < topk; ++j) {
    const uint32_t top = group_max<Layout::lanes>(best);
    const int winner = first_lane<Layout::lanes>(best == top), first = winner * keys.owned;
    int chosen;
    uint32_t left;
    if constexpr (!Layout::wide) {
      const uint32_t key = lane < Layout::per_lane ? keys[first + lane] : 0;
      const int place = first_lane<Layout::lanes>(lane < Layout::per_lane && key == top);
      chosen = first + place;
      left = group_max<Layout::lanes>(lane == place ? 0 : key);
      if (lane == place) keys[chosen] = 0;
    } else {
      int place = keys.owned;
      for (int i = lane; i < keys.owned && place == keys.owned; i += Layout::lanes) {
        if (keys[first + i] == top) place = i;
      }
      place = static_cast<int>(~group_max<Layout::lanes>(~static_cast<uint32_t>(place)));
      chosen = first + place;
      left = 0;
      for (int i = lane; i < keys.owned; i += Layout::lanes) left = i == place ? left : max(left, keys[first + i]);
      left = group_max<Layout::lanes>(left);
      if (lane == place % Layout::lanes) keys[chosen] = 0;
    }
    if (lane == winner) best = left;
    if (lane == 0) ids[j] = top == 0 ? -1 : chosen;
    __syncwarp();
  }
}

}  // namespace moe_ext::cuda
