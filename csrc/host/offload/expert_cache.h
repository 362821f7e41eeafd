// A cache of expert weights in device memory, simulated: which experts are there when a batch needs them.
#pragma once

#include <cstdint>
#include <iterator>
#include <limits>
#include <set>
#include <utility>
#include <vector>

namespace moe_ext {

enum class CachePolicy {
  kLeastRecentlyUsed,
  kBelady,     // knows the future: the most hits that any policy without prefetching can have
  kPredicted,  // knows what is predicted of the running batch
};

struct CacheCounts {
  int64_t hits = 0, misses = 0, prefetched = 0;
};

// Time is the order of needs: batch by batch, layer by layer, expert by expert. What goes is the resident expert whose
// next use is latest, as far as the policy knows it.
class ExpertCache {
 public:
  ExpertCache(const bool* needed, const bool* predicted, int64_t batches, int64_t layers, int64_t experts,
              int64_t capacity, CachePolicy policy, int64_t prefetch_per_layer)
      : needed_(needed),
        predicted_(predicted),
        batches_(batches),
        batch_size_(layers * experts),
        experts_(experts),
        capacity_(capacity),
        policy_(policy),
        prefetch_per_layer_(prefetch_per_layer),
        next_use_(batch_size_, kAbsent),
        next_batch_(batch_size_, 0) {}

  CacheCounts run() {
    for (int64_t batch = 0; batch < batches_; ++batch) {
      if (policy_ == CachePolicy::kPredicted) {
        foresee(batch);
        prefetch(batch, 0);
      }
      for (int64_t begin = 0; begin < batch_size_; begin += experts_) {
        for (int64_t expert = begin; expert < begin + experts_; ++expert) {
          if (needed_[batch * batch_size_ + expert]) use(batch, expert);
        }
        if (policy_ == CachePolicy::kPredicted) {
          // What was predicted of this layer and not needed is not wanted before the next batch.
          for (int64_t expert = begin; expert < begin + experts_; ++expert) {
            if (resident(expert)) keep(expert, later(batch, expert));
          }
          prefetch(batch, begin + experts_);
        }
      }
    }
    return counts_;
  }

 private:
  static constexpr int64_t kAbsent = -1;

  bool resident(int64_t expert) const { return next_use_[expert] != kAbsent; }
  int64_t later(int64_t batch, int64_t expert) const { return (batch + 1) * batch_size_ + expert; }

  void use(int64_t batch, int64_t expert) {
    resident(expert) ? ++counts_.hits : ++counts_.misses;
    if (!resident(expert) && static_cast<int64_t>(by_next_use_.size()) == capacity_) evict();
    keep(expert, next_use(batch, expert));
  }

  // As far as the policy knows, after the use in this batch.
  int64_t next_use(int64_t batch, int64_t expert) {
    switch (policy_) {
      case CachePolicy::kLeastRecentlyUsed: return std::numeric_limits<int64_t>::max() - clock_++;
      case CachePolicy::kPredicted: return later(batch, expert);
      case CachePolicy::kBelady: break;
    }
    int64_t& next = next_batch_[expert];
    for (next = batch + 1; next < batches_ && !needed_[next * batch_size_ + expert];) ++next;
    return next * batch_size_ + expert;
  }

  // A new batch is predicted.
  void foresee(int64_t batch) {
    for (int64_t expert = 0; expert < batch_size_; ++expert) {
      if (!resident(expert)) continue;
      const bool wanted = predicted_[batch * batch_size_ + expert];
      keep(expert, wanted ? batch * batch_size_ + expert : later(batch, expert));
    }
  }

  // While a layer runs, a few of the experts predicted of those behind it are fetched, next ones first.
  void prefetch(int64_t batch, int64_t begin) {
    int64_t left = prefetch_per_layer_;
    for (int64_t expert = begin; expert < batch_size_ && left > 0; ++expert) {
      if (resident(expert) || !predicted_[batch * batch_size_ + expert]) continue;
      const int64_t when = batch * batch_size_ + expert;
      if (static_cast<int64_t>(by_next_use_.size()) == capacity_) {
        if (by_next_use_.rbegin()->first <= when) return;
        evict();
      }
      keep(expert, when);
      ++counts_.prefetched, --left;
    }
  }

  void keep(int64_t expert, int64_t next_use) {
    if (resident(expert)) by_next_use_.erase({next_use_[expert], expert});
    next_use_[expert] = next_use;
    by_next_use_.emplace(next_use, expert);
  }

  void evict() {
    const auto latest = std::prev(by_next_use_.end());
    next_use_[latest->second] = kAbsent;
    by_next_use_.erase(latest);
  }

  const bool *needed_, *predicted_;  // [batches, layers, experts]
  int64_t batches_, batch_size_, experts_, capacity_;
  CachePolicy policy_;
  int64_t prefetch_per_layer_, clock_ = 0;
  std::vector<int64_t> next_use_, next_batch_;  // of every expert of every layer
  std::set<std::pair<int64_t, int64_t>> by_next_use_;
  CacheCounts counts_;
};

}  // namespace moe_ext
