// From a list of tiles to tasks for threads: integers only.
#pragma once
#include <vector>

#include "params.h"

namespace ringattn {

// Tiles cut into segments, for each batch row, or once for all of them.
class TaskSchedule {
 public:
  // tiles: (n, 7) integers, as in ringattn/geometry/tiles.py.
  TaskSchedule(const int64_t* tiles, int64_t n, int64_t batch);
  TaskSchedule(TaskSchedule&&) = default;  // segments point into it: moved, never copied

  const std::vector<QuerySegment>& segments(int64_t batch_row) const {
    return rows_.size() == 1 ? rows_[0] : rows_[batch_row];
  }

  // Largest first, so that threads finish together.
  std::vector<ForwardTask> forward(const AttentionParams& p, const KernelTable& kernels) const;

  // Into how many parts keys must be cut so that so many threads have work alike.
  static int64_t num_parts(const AttentionParams& p, int64_t threads);

  // Each head's keys cut into parts of even work. Part n writes to dq[n].
  std::vector<BackwardTask> backward(const AttentionParams& p, const std::vector<AccumulatorView>& dq) const;

 private:
  std::vector<QuerySegment> cut(std::vector<const Tile*> tiles);

  std::vector<Tile> tiles_;
  std::vector<std::vector<QuerySegment>> rows_;
  std::vector<std::vector<const Tile*>> lists_;  // of the segments' tiles, which point here
};

}  // namespace ringattn
