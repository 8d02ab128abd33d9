// Divides a list of mask tiles into tasks for threads. Integers only.
#pragma once
#include <vector>

#include "params.h"

namespace ringattn {

// The tiles of a call, divided into query segments: for each batch row, or once if all batch rows share the tiles.
class TaskSchedule {
 public:
  // tiles: (n, 7) integers, as in ringattn/geometry/tiles.py.
  TaskSchedule(const int64_t* tiles, int64_t n, int64_t batch);
  TaskSchedule(TaskSchedule&&) = default;  // segments point into the schedule: it moves, but is not copied

  const std::vector<QuerySegment>& segments(int64_t batch_row) const {
    return segments_.size() == 1 ? segments_[0] : segments_[batch_row];
  }

  // The forward's tasks, largest first, so that threads finish at about the same time.
  std::vector<ForwardTask> forward_tasks(const AttentionParams& p, const KernelTable& kernels) const;

  // The number of splits of each head's keys that gives all threads about the same work.
  static int64_t num_key_splits(const AttentionParams& p, int64_t threads);

  // The backward's tasks. Each head's keys are split into dq.size() ranges of equal work; range n adds to dq[n].
  std::vector<BackwardTask> backward_tasks(const AttentionParams& p, const std::vector<AccumulatorView>& dq) const;

 private:
  std::vector<const Tile*> tiles_of(int64_t batch_row) const;
  std::vector<QuerySegment> make_segments(std::vector<const Tile*> tiles);

  std::vector<Tile> tiles_;
  std::vector<std::vector<QuerySegment>> segments_;
  std::vector<std::vector<const Tile*>> segment_tiles_;  // QuerySegment::tiles points here
};

}  // namespace ringattn
