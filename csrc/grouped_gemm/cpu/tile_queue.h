// Tiles of many products in one queue, which all threads empty together.
//
// A tile may wait for others: the down projection of an expert for its up projection, the reuse of a buffer for whoever
// reads it. Tiles are taken in the order in which they were added and wait only for earlier ones, so a queue never
// locks up, on one thread as little as on many. Neither many tiny products nor a huge one leaves a core idle: small
// products are whole tiles side by side, a large one is cut into many.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "multiply_tile.h"

namespace moe_ext::cpu {

// A thread that finds less to do costs more to wake than it saves: some 5 us of arithmetic, 50 us of reading weights.
constexpr int64_t kMultiplyAddsPerThread = 1 << 18;

class TileQueue {
 public:
  // Counts tiles that are not done.
  using Counter = int32_t;
  static constexpr Counter kNone = -1;

  struct Task {
    int32_t kind;
    int32_t group;
    Tile tile;
    Counter waits;
    Counter done;
  };

  Counter add_counter() {
    counts_.push_back(0);
    return static_cast<Counter>(counts_.size()) - 1;
  }

  void add(int32_t kind, int32_t group, const Tile& tile, Counter waits, Counter done) {
    if (done != kNone) ++counts_[done];
    tasks_.push_back({kind, group, tile, waits, done});
  }

  void add(int32_t kind, int32_t group, const TileGrid& grid, Counter waits, Counter done) {
    for (int64_t i = 0; i < grid.count(); ++i) add(kind, group, grid.tile(i), waits, done);
  }

  // run_task(task) for every task; must not throw. `multiply_adds` of all tasks say how many threads are worth waking.
  template <typename RunTask>
  void run(int64_t multiply_adds, const RunTask& run_task) const {
    std::unique_ptr<std::atomic<int64_t>[]> open(new std::atomic<int64_t>[counts_.size() + 1]);
    for (size_t i = 0; i < counts_.size(); ++i) open[i].store(counts_[i], std::memory_order_relaxed);
    std::atomic<size_t> next = 0;
    const auto wait = [&](Counter counter) {
      while (counter != kNone && open[counter].load(std::memory_order_acquire) > 0) std::this_thread::yield();
    };
    const auto work = [&](int64_t, int64_t) {
      for (size_t index = next++; index < tasks_.size(); index = next++) {
        const Task& task = tasks_[index];
        wait(task.waits);
        run_task(task);
        if (task.done != kNone) open[task.done].fetch_sub(1, std::memory_order_release);
      }
    };
    const int64_t workers = std::min({torch::stable::get_num_threads() + int64_t{0},
                                      static_cast<int64_t>(tasks_.size()), multiply_adds / kMultiplyAddsPerThread + 1});
    if (workers > 0) torch::stable::parallel_for(0, workers, 1, work);
  }

 private:
  std::vector<Task> tasks_;
  std::vector<int64_t> counts_;
};

// An expert's rows.
struct Group {
  int64_t expert;
  int64_t begin;
  int64_t rows;
};

// Groups that hold rows, the largest first: what is left at the end of a queue is small.
inline std::vector<Group> largest_first(const std::vector<int64_t>& boundaries) {
  std::vector<Group> groups;
  for (size_t expert = 0; expert + 1 < boundaries.size(); ++expert) {
    const int64_t rows = boundaries[expert + 1] - boundaries[expert];
    if (rows > 0) groups.push_back({static_cast<int64_t>(expert), boundaries[expert], rows});
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.rows > b.rows; });
  return groups;
}

}  // namespace moe_ext::cpu
