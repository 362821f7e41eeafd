// The order in which experts pass through two stages of tiles, the second reading what the first left in a buffer.
//
// The buffer holds the rows of a few experts only (`depth`), so that they are still in cache when they are read: the
// first stage runs depth - 1 experts ahead of the second, and reuses the rows of an expert whose second stage is done.
#pragma once

#include "../grouped_gemm/cpu/tile_queue.h"

namespace moe_ext::cpu {

class ExpertPipeline {
 public:
  // `groups` the largest first; `tiles_of_first` of the smallest.
  ExpertPipeline(const std::vector<Group>& groups, int64_t tiles_of_smallest) : groups_(groups) {
    if (groups.empty()) return;
    // Far enough ahead that the first stages under way occupy every thread twice.
    const int64_t threads = torch::stable::get_num_threads();
    depth_ = 2 + (2 * threads + tiles_of_smallest - 1) / std::max<int64_t>(1, tiles_of_smallest);
    int64_t all_rows = 0;
    for (const Group& group : groups) all_rows += group.rows;
    recycles_ = depth_ * groups.front().rows < all_rows;
    num_rows_ = recycles_ ? depth_ * groups.front().rows : all_rows;
    for (size_t i = 0; i < groups.size(); ++i) {
      buffer_rows_.push_back(recycles_ ? static_cast<int64_t>(i) % depth_ * groups.front().rows
                             : i == 0  ? 0
                                       : buffer_rows_.back() + groups[i - 1].rows);
    }
  }

  int64_t num_rows() const { return num_rows_; }  // of the buffer
  int64_t buffer_row(size_t index) const { return buffer_rows_[index]; }

  // add_first(index, waits, done) and add_second(index, waits, done) add the tiles of a group's stage.
  template <typename AddFirst, typename AddSecond>
  void fill(TileQueue& queue, const AddFirst& add_first, const AddSecond& add_second) const {
    const auto count = static_cast<int64_t>(groups_.size());
    std::vector<TileQueue::Counter> written(count), read(count);
    const auto first = [&](int64_t index) {
      if (index >= count) return;
      written[index] = queue.add_counter();
      add_first(index, recycles_ && index >= depth_ ? read[index - depth_] : TileQueue::kNone, written[index]);
    };
    for (int64_t index = 0; index < std::min(depth_ - 1, count); ++index) first(index);
    for (int64_t index = 0; index < count; ++index) {
      read[index] = queue.add_counter();
      add_second(index, written[index], read[index]);
      first(index + depth_ - 1);
    }
  }

 private:
  std::vector<Group> groups_;
  std::vector<int64_t> buffer_rows_;
  int64_t depth_ = 0;
  int64_t num_rows_ = 0;
  bool recycles_ = false;
};

}  // namespace moe_ext::cpu
